"""The pages: plain functions from values to HTML. Nothing here knows of sessions or requests.

Whatever comes from outside goes through ``escape`` (here called ``_e``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape as _e
from typing import Any


@dataclass(frozen=True)
class Case:
    """One button of the page, and what should happen when it is pressed."""

    path: str
    title: str
    promise: str
    button: str
    method: str = "post"


@dataclass(frozen=True)
class Form:
    """What the visitor has typed into the transfer form, and what is wrong with it."""

    source: str = ""
    target: str = ""
    amount: str = ""
    memo: str = ""
    wrong_field: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Home:
    """All that the first page shows."""

    token: str
    accounts: Sequence[tuple[int, str, str]]
    latest: Sequence[tuple[str, str, str]]
    receipts: Sequence[str]
    cases: Sequence[Case]
    panel: Mapping[str, Any]
    flash: str = ""
    form: Form = field(default_factory=Form)


def home(page: Home) -> str:
    alert = ""
    if page.form.problem:
        alert = f'<p class="note bad" role="alert" id="problem">{_e(page.form.problem)}</p>'
    elif page.flash:
        alert = f'<p class="note good" role="status">{_e(page.flash)}</p>'
    title = "Not transferred | The ledger" if page.form.problem else "The ledger"
    return _document(
        title,
        f"""
<header>
  <h1>The ledger</h1>
  <p>A small bank whose books must always add up. Each button does what people do to such a site;
  the panel shows what became of it in the database.</p>
</header>
<main>
  {alert}
  <div class="columns">
    <div class="desk">
      <div class="pair">
        <div class="stack">
          {_accounts(page.accounts)}
          {_receipts(page.receipts)}
        </div>
        {_transfer_form(page)}
      </div>
      {_cases(page.cases, page.token)}
      {_latest(page.latest)}
    </div>
    {_panel(page.panel)}
  </div>
</main>""",
        script=True,
    )


def dry_run(rows: Iterable[tuple[str, str, str]]) -> str:
    """What a transfer would do: name, balance now, balance afterwards."""
    lines = "".join(
        f'<tr><th scope="row">{_e(name)}</th><td class="number">{_e(now)}</td><td class="number">{_e(then)}</td></tr>'
        for name, now, then in rows
    )
    return _message(
        "Dry run",
        f"""<p>The transfer was written to the database in full, and this page was made from what
was written. The answer is a success (200), and yet nothing was kept.</p>
<table>
<caption>What the transfer would do</caption>
<thead><tr><th scope="col">Account</th><th scope="col" class="number">Now</th>
<th scope="col" class="number">Afterwards</th></tr></thead>
<tbody>{lines}</tbody>
</table>""",
    )


def failed_in_view(done: str) -> str:
    return _message(
        "500: the view says no",
        f"""<p>{_e(done)} Then the view answered 500, with this page.</p>
<p>Nothing of it was kept, and no receipt was sent.</p>""",
    )


def unexpected(exception_name: str) -> str:
    return _message(
        "500: something went wrong",
        f"""<p>The request ended in an exception: <code>{_e(exception_name)}</code>.</p>
<p>Nothing of it was kept, and no receipt was sent.</p>""",
    )


def refused(title: str, reason: str) -> str:
    return _message(title, f"<p>{_e(reason)}</p>\n<p>Nothing was changed.</p>")


def _document(title: str, body: str, script: bool = False) -> str:
    tag = '<script src="/static/panel.js" defer></script>' if script else ""
    return f"""<!DOCTYPE html>
<html lang="en-GB">
<head>
<meta charset="utf-8">
<title>{_e(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="/static/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/static/style.css">
{tag}
</head>
<body>{body}
</body>
</html>
"""


def _message(title: str, content: str) -> str:
    return _document(
        f"{title} | The ledger",
        f"""
<main class="message">
<h1>{_e(title)}</h1>
{content}
<p><a class="button" href="/">Back to the ledger</a></p>
</main>""",
    )


def _accounts(accounts: Iterable[tuple[int, str, str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_e(name)}</th><td class="number" data-account="{number}">{_e(balance)}</td></tr>'
        for number, name, balance in accounts
    )
    return f"""<section aria-labelledby="accounts-title">
<h2 id="accounts-title">Accounts</h2>
<table>
<caption>Balances; interest is paid every few seconds</caption>
<thead><tr><th scope="col">Account</th><th scope="col" class="number">Balance</th></tr></thead>
<tbody>{rows}</tbody>
</table>
</section>"""


def _transfer_form(page: Home) -> str:
    form = page.form

    def wrong(name: str) -> str:
        if name != form.wrong_field:
            return ""
        return ' aria-invalid="true" aria-describedby="problem" autofocus'

    def choice(name: str, label: str, chosen: str) -> str:
        options = "".join(
            f'<option value="{number}"{" selected" if str(number) == chosen else ""}>{_e(account)}</option>'
            for number, account, _ in page.accounts
        )
        return f"""<p><label for="{name}">{label}</label>
<select id="{name}" name="{name}" required{wrong(name)}>{options}</select></p>"""

    # The second and the third account, as the first is the bank's own.
    numbers = [str(number) for number, _, _ in page.accounts]
    return f"""<section aria-labelledby="transfer-title">
<h2 id="transfer-title">Transfer</h2>
<form method="post" action="/transfer">
{_token(page.token)}
{choice("source", "From", form.source or numbers[1])}
{choice("target", "To", form.target or numbers[2])}
<p><label for="amount">Amount in £</label>
<input id="amount" name="amount" inputmode="decimal" required maxlength="12" autocomplete="off"
 placeholder="12.50" value="{_e(form.amount)}"{wrong("amount")}></p>
<p><label for="memo">What for <span class="quiet">(optional)</span></label>
<input id="memo" name="memo" maxlength="80" autocomplete="off"
 value="{_e(form.memo)}"{wrong("memo")}></p>
<p><button class="main">Transfer</button></p>
</form>
</section>"""


def _cases(cases: Iterable[Case], token: str) -> str:
    items = []
    for case in cases:
        name = case.path.strip("/").replace("/", "-").replace(".", "-")
        hidden = _token(token) if case.method == "post" else ""
        items.append(
            f"""<li>
<h3>{_e(case.title)}</h3>
<p id="{name}-promise">{_e(case.promise)}</p>
<form method="{case.method}" action="{_e(case.path)}" id="{name}">{hidden}
<button aria-describedby="{name}-promise">{_e(case.button)}</button>
</form>
</li>"""
        )
    return f"""<section aria-labelledby="cases-title">
<h2 id="cases-title">The cases that bite</h2>
<ul class="cases">{"".join(items)}</ul>
</section>"""


def _latest(latest: Iterable[tuple[str, str, str]]) -> str:
    rows = "".join(
        f'<tr><td>{_e(account)}</td><td class="memo">{_e(memo)}</td><td class="number">{_e(amount)}</td></tr>'
        for account, memo, amount in latest
    )
    return f"""<section aria-labelledby="latest-title">
<h2 id="latest-title">Latest entries</h2>
<table>
<caption>Newest first, without those of interest</caption>
<thead><tr><th scope="col">Account</th><th scope="col">What for</th>
<th scope="col" class="number">Amount</th></tr></thead>
<tbody id="latest">{rows}</tbody>
</table>
</section>"""


def _receipts(receipts: Sequence[str]) -> str:
    if receipts:
        lines = "".join(f"<li>{_e(receipt)}</li>" for receipt in receipts)
        content = f'<ol class="receipts" id="receipts">{lines}</ol>'
    else:
        content = '<p class="quiet" id="receipts">None yet.</p>'
    return f"""<section aria-labelledby="receipts-title">
<h2 id="receipts-title">Receipts sent</h2>
{content}
</section>"""


def _panel(panel: Mapping[str, Any]) -> str:
    sound = "good" if panel["sound"] else "bad"
    rows = "".join(
        "<tr>"
        f"<td>{_e(line['method'])}</td>"
        f'<td class="path">{_e(line["path"])}</td>'
        f"<td>{_e(line['status'])}</td>"
        f'<td><span class="{_e(line["kind"])}">{_e(line["outcome"])}</span>{_attempt(line["attempts"])}</td>'
        f'<td class="number">{line["statements"]}</td>'
        f'<td class="number">{line["milliseconds"]:.1f}</td>'
        "</tr>"
        for line in panel["requests"]
    )
    return f"""<section class="panel" aria-labelledby="panel-title" id="panel">
<h2 id="panel-title">What the database saw</h2>
<p class="note {sound}" role="status" id="verdict">{_e(panel["verdict"])}</p>
<dl class="gauges">
<div><dt>Connections checked out</dt><dd id="connections">{panel["connections"]}</dd></div>
<div><dt>Units of work open</dt><dd id="units">{panel["units"]}</dd></div>
</dl>
<p class="quiet" id="freshness">As it was when this page was made.</p>
<p class="unseen" role="status" id="news"></p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="requests-caption">
<table>
<caption id="requests-caption">The last requests, newest first; SQL: statements</caption>
<thead><tr><th scope="col">Method</th><th scope="col">Path</th><th scope="col">Status</th>
<th scope="col">Outcome</th><th scope="col" class="number">SQL</th>
<th scope="col" class="number">ms</th></tr></thead>
<tbody id="requests">{rows}</tbody>
</table>
</div>
</section>"""


def _attempt(number: int) -> str:
    return f' <span class="attempt">attempt {number}</span>' if number > 1 else ""


def _token(token: str) -> str:
    return f'<input type="hidden" name="token" value="{_e(token)}">'
