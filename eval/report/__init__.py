"""`lift-eval report`: two runs of lift-eval lmm come in; one HTML page, and its numbers in JSON and CSV, go out.

`command` gathers what the page shows, `tables`, `reading`, `plots`, `flips`, `training` and `encoders` make its parts, and
`report.html.jinja`, `report.css`, `report.js` are the page. Text from data is escaped by Jinja2; in the one JSON block it
cannot end the block, and the page's script puts it on the page as text only.
"""
