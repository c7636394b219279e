// The curves of a run, to look into: drag to zoom, double-click to go back, point to see values.
// Takes the place of the drawn picture, which stays where no script runs.
"use strict";
{
  const data = document.getElementById("curve-data");
  const holder = document.getElementById("live-curves");
  const style = getComputedStyle(document.documentElement);
  const ink = () => style.getPropertyValue("--ink").trim();
  const line = () => style.getPropertyValue("--line").trim();
  const plain = (value) =>
    value == null ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4);
  const short = (value) => {
    if (value == null) return "";
    const size = Math.abs(value), inWords = size === 0 || (size >= 1e-3 && size < 1e5);
    return inWords ? String(Number(value.toPrecision(4))) : value.toExponential(0);
  };
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };

  const options = (panel, width) => ({
    title: panel.title,
    width,
    height: 240,
    scales: { x: { time: false }, y: { distr: panel.scale } },
    cursor: { sync: { key: "step" }, drag: { x: true, y: false } },
    axes: [
      axis,
      { ...axis, size: 56, values: (_, splits) => splits.map(short) },
    ],
    series: [
      { label: "step", value: (_, value) => plain(value) },
      ...panel.series.map((own) => ({
        label: own.label, stroke: own.colour, width: 1.5, spanGaps: true,
        points: { show: own.values.length < 60 },
        value: (_, value) => plain(value),
      })),
    ],
  });

  const draw = (panel) => {
    const place = holder.appendChild(document.createElement("div"));
    const table = [panel.steps, ...panel.series.map((own) => own.values)];
    const chart = new uPlot(options(panel, place.clientWidth), table, place);
    new ResizeObserver(() => {
      if (place.clientWidth && place.clientWidth !== chart.width)
        chart.setSize({ width: place.clientWidth, height: 240 });
    }).observe(place);
  };

  if (data && holder) {
    holder.parentElement.hidden = false;
    JSON.parse(data.textContent).forEach(draw);
    document.getElementById("drawn-curves").hidden = true;
  }
}
