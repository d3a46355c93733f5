// Shows the values of the curves under the pointer. The page is complete without it.
const readCurves = () => {
  for (const plot of document.querySelectorAll("svg.plot")) {
    const [xHigh, low, high, height, log, percent] = plot.dataset.axes.split(" ").map(Number);
    const figure = plot.closest("figure"), at = figure.querySelector(".at");
    const shown = [...figure.querySelectorAll(".legend b")], last = shown.map((node) => node.textContent);
    const lines = [...plot.querySelectorAll(".line")].map((line) =>
      [...line.getAttribute("d").matchAll(/(-?[\d.]+) (-?[\d.]+)/g)].map((point) => [+point[1], +point[2]]));
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y2", height);
    const show = (y) => {
      const share = 1 - y / height, value = log ? low * (high / low) ** share : low + (high - low) * share;
      return percent ? (100 * value).toFixed(1) + " %" : String(+value.toPrecision(3));
    };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const x = Math.min(1000, Math.max(0, ((event.clientX - box.left) / box.width) * 1000));
      at.textContent = "step " + Math.round((x / 1000) * xHigh).toLocaleString("en");
      cursor.setAttribute("x1", x / 10 + "%");
      cursor.setAttribute("x2", x / 10 + "%");
      plot.append(cursor);
      lines.forEach((points, index) => {
        if (!points.length) return;
        const nearest = points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
        shown[index].textContent = show(nearest[1]);
      });
    });
    plot.addEventListener("pointerleave", () => {
      at.textContent = "";
      cursor.remove();
      last.forEach((text, index) => (shown[index].textContent = text));
    });
  }
};
readCurves();
