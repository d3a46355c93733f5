"""Parse the HTML pages and find what overlaps in them."""

from html.parser import HTMLParser

EVIL = '"><script>hacked=1</script><img src=x onerror="hacked=1">{{7*7}}\u202e'


class ParsedPage(HTMLParser):
    """The tags of a page with their attributes, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.hidden = "", 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


OVERLAPS = """
[...document.querySelectorAll("svg.plot")].flatMap(plot => ["x", "y", "end"].flatMap(kind => {
  const boxes = [...plot.querySelectorAll("text." + kind)].map(node => node.getBoundingClientRect());
  return boxes.filter((a, i) => boxes.some((b, j) => j > i && a.left < b.right && b.left < a.right &&
    a.top + 2 < b.bottom && b.top + 2 < a.bottom)).map(() => plot.id + " " + kind);
}))
"""


OUTSIDE = """
[...document.querySelectorAll("svg.plot text")].filter(node => {
  const box = node.getBoundingClientRect(), plot = node.closest("svg").getBoundingClientRect();
  return box.left < -0.5 || box.right > innerWidth + 0.5 || (node.matches(".y") && box.right > plot.left);
}).map(node => node.textContent)
"""


UNNAMED = """
[...document.querySelectorAll("svg[role=img]")].filter(svg => ["labelledby", "describedby"].some(how =>
  !document.getElementById(svg.getAttribute("aria-" + how))?.textContent.trim())).map(svg => svg.id)
"""


DOUBLE_IDS = """
[...document.querySelectorAll("[id]")].map(node => node.id).filter((id, i, all) => all.indexOf(id) !== i)
"""
