"use strict";
const make = (tag, kind, said) => { const node = document.createElement(tag); if (kind) node.className = kind; if (said !== undefined) node.textContent = said; return node };

for (const table of document.querySelectorAll("table.sorts")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = make("button", "", head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending", body = table.tBodies[0];
      const key = row => { const cell = row.cells[column], v = cell.dataset.v; return v === undefined ? cell.textContent : v === "" ? -Infinity : +v };
      const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
      [...body.rows].sort((a, b) => order(key(a), key(b)) * (down ? -1 : 1)).forEach(row => body.append(row));
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}

addEventListener("beforeprint", () => document.querySelectorAll("#results details").forEach(d => { d.open = true }));

async function unpacked(id) {
  const node = document.getElementById(id);
  if (!node) return [];
  const bytes = Uint8Array.from(atob(node.textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

const told = document.getElementById("answers");
if (told) {
  const { models, objectives, fold, rows } = JSON.parse(told.textContent);
  const [find, group, left, right, order] = ["find", "group", "left", "right", "order"].map(id => document.getElementById(id));
  const list = document.getElementById("list"), more = document.getElementById("more"), count = document.getElementById("count");
  const PAGE = 20;
  let shown = PAGE;
  const hay = new WeakMap();
  const text = row => { if (!hay.has(row)) hay.set(row, [row.id, ...row.said.map(s => s[1]), ...row.answers.map(a => a ? a[0] : "")].join("\n").toLowerCase()); return hay.get(row) };
  const gain = row => {
    const a = row.answers[left.value], b = row.answers[right.value];
    if (!a || !b || [...a[1], ...b[1]].includes(null)) return null;
    return b[1].map((v, k) => v - a[1][k]);
  };
  const lexicographic = (x, y) => { for (let k = 0; k < x.length; k++) if (x[k] !== y[k]) return x[k] - y[k]; return 0 };
  const mark = v => v === null ? "–" : String(Math.round(v * 100) / 100);

  function answer(model, given) {
    const box = make("div"), who = make("div", "who");
    who.append(make("b", "", models[model]), " " + (given ? objectives.map((o, k) => `${o} ${mark(given[1][k] ?? null)}`).join(" · ") : "no answer"));
    box.append(who);
    if (!given) return box;
    if (given[1][0] !== null && given[1][0] < fold) {
      const folded = make("details");
      folded.append(make("summary", "", `folded: ${objectives[0]} ${mark(given[1][0])}, ${given[0].length} characters`), make("div", "said", given[0]));
      box.append(folded);
    } else box.append(make("div", "said", given[0]));
    return box;
  }
  function card(row) {
    const node = make("article", "card"), head = make("div");
    [row.group, row.id].filter(Boolean).forEach(said => head.append(make("span", "chip", said)));
    const change = gain(row);
    if (change) head.append(make("span", "chip", change.map(v => (v > 0 ? "+" : "") + mark(v)).join(" / ")));
    node.append(head);
    row.said.forEach(([role, said], k) => node.append(make("div", k === row.said.length - 1 ? "said asked" : "said who", row.said.length > 1 ? `${role}: ${said}` : said)));
    const pair = make("div", "pair");
    pair.append(answer(left.value, row.answers[left.value]), answer(right.value, row.answers[right.value]));
    node.append(pair);
    return node;
  }
  function draw() {
    const words = find.value.toLowerCase();
    let found = rows.filter(row => (!group.value || row.group === group.value) && (!words || text(row).includes(words)));
    if (order.value) {
      const up = order.value === "loss" ? 1 : -1;
      found = found.map(row => [row, gain(row)]).filter(p => p[1]).sort((a, b) => up * lexicographic(a[1], b[1])).map(p => p[0]);
    }
    list.replaceChildren(...found.slice(0, shown).map(card));
    more.hidden = found.length <= shown;
    count.textContent = `${Math.min(shown, found.length)} of ${found.length} shown`;
  }
  const again = () => { shown = PAGE; draw() };
  find.addEventListener("input", again);
  [group, left, right, order].forEach(node => node.addEventListener("change", again));
  more.addEventListener("click", () => { shown += PAGE; draw() });
  document.getElementById("unfold").addEventListener("click", () => document.querySelectorAll("#list details, #examples details").forEach(d => { d.open = true }));
  draw();
  unpacked("packed").then(further => { if (further.length) { rows.push(...further); draw() } document.body.dataset.ready = "yes" },
    () => { count.textContent = "this browser cannot unpack the further answers; they are in report.jsonl" });
}
