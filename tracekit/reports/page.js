// Draws the charts of a report: in the colours of the page, as wide as it is, and again when either changes.
(() => {
  "use strict";
  const { charts, colours } = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  let printing = false;

  // The same chart for a dark page or a small screen. Data are left as they are.
  function adapted(node, key, look) {
    if (key === "datasets" || key === "values" || key === "domain") return node;
    if (Array.isArray(node)) return node.map((item) => adapted(item, key, look));
    if (node !== null && typeof node === "object") {
      const entries = Object.entries(node).map(([name, item]) => [name, adapted(item, name, look)]);
      return Object.fromEntries(entries);
    }
    if (key === "background") return "transparent";
    if (look.dark && key === "color" && node === "white") return "#10151a";
    // What a mark has by a condition is drawn on a colour of its own.
    if (look.dark && key !== "value" && typeof node === "string") return colours[node] ?? node;
    if (look.narrow && typeof node === "number" && /fontSize|LabelLimit|labelLimit/i.test(key)) return node * 1.45;
    return node;
  }

  const named = (chart) => chart.layer?.[0].encoding?.y?.type === "nominal";

  function slim(spec) {
    spec.width = 200;
    for (const { encoding } of spec.layer) {
      if (encoding.y?.axis) Object.assign(encoding.y.axis, { labelExpr: "split(datum.label, ' (')[0]", labelLimit: 120 });
    }
  }

  function draw(chart, index) {
    const look = { dark: dark.matches && !printing, narrow: narrow.matches && !printing };
    // Where names stand beside the plot, larger letters would only make the chart wider.
    look.slim = look.narrow && named(chart);
    if (look.slim) look.narrow = false;
    const spec = adapted(structuredClone(chart), "", look);
    if (look.narrow && spec.layer && typeof spec.height === "number") spec.height *= 1.35;
    // Larger names need more room than the plot has.
    if (look.narrow) for (const { mark } of spec.layer ?? []) if (mark.type === "text") mark.clip = false;
    if (look.slim) slim(spec);
    const place = document.getElementById(`chart-${index}`);
    const controls = document.getElementById(`controls-${index}`);
    controls.textContent = "";
    const options = {
      mode: "vega-lite",
      renderer: "svg",
      bind: controls,
      ast: true, // expressions are interpreted: the page allows no code made from text
      actions: { export: true, source: false, compiled: false, editor: false },
      tooltip: { theme: look.dark ? "dark" : "light" },
      downloadFileName: `chart-${index + 1}`,
    };
    return vegaEmbed(place, spec, options).then(
      () => place.setAttribute("data-drawn", "yes"),
      (error) => {
        place.textContent = "The chart could not be drawn; its table has the numbers.";
        console.error(error);
      },
    );
  }

  const drawAll = () => Promise.all(charts.map(draw));
  drawAll();
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);

  const closed = () => document.querySelectorAll("details.more:not([open]):not(.sql)");
  addEventListener("beforeprint", () => {
    printing = true;
    closed().forEach((details) => { details.open = true; details.dataset.opened = ""; });
    if (dark.matches || narrow.matches) drawAll();
  });
  addEventListener("afterprint", () => {
    printing = false;
    document.querySelectorAll("details[data-opened]").forEach((details) => {
      details.open = false;
      delete details.dataset.opened;
    });
    if (dark.matches || narrow.matches) drawAll();
  });

  // A link to a closed part opens it.
  function open() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) target.open = true;
  }
  addEventListener("hashchange", open);
  open();
})();
