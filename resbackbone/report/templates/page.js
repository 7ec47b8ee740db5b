// A click on a header sorts its table by that column: numbers from the largest, text from A. A second click reverses it.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const key = (row) => {
      const cell = row.cells[column], value = cell.dataset.value;
      return value === undefined ? cell.textContent : value === "" ? null : Number(value);
    };
    const numeric = [...body.rows].some((row) => row.cells[column].dataset.value !== undefined);
    if (header.textContent === "") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const now = header.getAttribute("aria-sort"), first = numeric ? "descending" : "ascending";
      const order = now === null ? first : now === "ascending" ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);  // undefined values come last
        return sign * (numeric ? x - y : x.localeCompare(y));
      }));
    });
  });
}

// Over a chart, a line follows the pointer, and a note beside it names the values of the curves there.
for (const chart of document.querySelectorAll("figure.chart")) {
  const curves = [...chart.querySelectorAll("g[data-points]")];
  if (!curves.length) continue;
  const svg = chart.querySelector("svg"), cursor = svg.querySelector(".cursor"), note = document.createElement("div");
  const points = curves.map((curve) => JSON.parse(curve.dataset.points));
  note.className = "note";
  note.hidden = true;
  chart.append(note);
  const line = (text, curve) => {
    const row = document.createElement("div"), key = document.createElement("i");
    if (curve) key.className = curve.getAttribute("class");
    row.append(...(curve ? [key] : []), text);
    return row;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, distance = (point) => Math.abs(point[0] - x);
    const nearest = points.map((of) => of.reduce((a, b) => (distance(b) < distance(a) ? b : a)));
    const [at, place] = nearest.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const rows = curves.map((curve, i) => [curve, nearest[i]]).filter(([, point]) => Math.abs(point[0] - at) < 3);
    note.replaceChildren(
      line(`${svg.dataset.x}: ${place}`),
      ...rows.map(([curve, point]) => line(`${curve.dataset.name}: ${point[2]}`, curve)),
    );
    note.hidden = false;
    cursor.setAttribute("d", `M${at} 10V${svg.dataset.bottom}`);
    const room = chart.clientWidth - note.offsetWidth;
    note.style.left = `${Math.max(0, Math.min(at / scale + 12, room))}px`;
  });
  svg.addEventListener("pointerleave", () => {
    note.hidden = true;
    cursor.setAttribute("d", "");
  });
}
