"use strict";
/* What leaves the page: the picture as SVG or PNG, and what was edited as a supernode file. */

fasttc.export = (() => {
  const { colour, visible } = fasttc.base;
  const SANS = "Inter, system-ui, -apple-system, 'Segoe UI', sans-serif";

  /** The drawing as an SVG element that needs no style sheet. */
  function picture(app) {
    const { scene } = app, { extent, rows, columns } = fasttc.draw.geometry;
    const [x0, x1] = d3.extent([extent.x0, extent.x1, ...scene.nodes.flatMap((node) => [node.x - 20, node.x + 20])]);
    const [y0, y1] = d3.extent([extent.y0, extent.y1, ...scene.nodes.map((node) => node.y)]);
    const svg = d3.create("svg:svg").attr("xmlns", "http://www.w3.org/2000/svg").attr("width", Math.ceil(x1 - x0)).attr("height", Math.ceil(y1 - y0))
      .attr("viewBox", [x0, y0, x1 - x0, y1 - y0].map(Math.ceil)).attr("font-family", SANS).attr("font-size", 12);
    svg.append("title").text(visible(app.data.prompt));
    svg.append("rect").attr("x", x0).attr("y", y0).attr("width", "100%").attr("height", "100%").attr("fill", colour("ground"));
    columns.forEach((column, at) => at % 2 && svg.append("rect").attr("x", column.left).attr("width", column.width)
      .attr("y", extent.y0).attr("height", extent.y1).attr("fill", colour("band")));
    for (const row of rows) if (row?.name) svg.append("text").attr("x", 10).attr("y", row.top + row.height / 2 + 4).attr("fill", colour("quiet")).attr("font-size", 10).text(row.name);
    edges(svg.append("g").attr("fill", "none").attr("stroke-linecap", "round"), scene);
    for (const node of scene.nodes) drawNode(svg.append("g").attr("transform", `translate(${node.x},${node.y})`), node);
    return svg.node();
  }

  function edges(group, scene) {
    const top = scene.edges[0]?.flow || 1;
    for (const edge of scene.edges.slice(0, fasttc.edges.MOST).reverse()) {
      if (!(edge.flow > 0)) continue;
      const { x0, y0, x1, y1 } = fasttc.edges.ends(scene, edge), level = fasttc.edges.strength(edge, top), middle = (y0 + y1) / 2;
      group.append("path").attr("d", `M${[x0, y0]}C${[x0, middle, x1, middle, x1, y1].map((value) => value.toFixed(1))}`)
        .attr("stroke", colour(fasttc.edges.colourName(scene, edge))).attr("stroke-width", fasttc.edges.widthOf(level).toFixed(2))
        .attr("stroke-opacity", fasttc.edges.opacityOf(level).toFixed(2));
    }
  }

  function drawNode(group, node) {
    const drawn = document.querySelector(`#nodes g.node[data-index="${node.index}"]`);
    const shape = drawn.querySelector(".shape"), style = getComputedStyle(shape);
    group.append("path").attr("d", shape.getAttribute("d")).attr("fill", style.fill).attr("stroke", style.stroke)
      .attr("stroke-width", style.strokeWidth).attr("stroke-dasharray", style.strokeDasharray === "none" ? null : style.strokeDasharray);
    for (const text of drawn.querySelectorAll("text")) {
      if (!text.textContent) continue;
      const own = getComputedStyle(text);
      group.append("text").attr("x", text.getAttribute("x")).attr("y", 4 + Number(text.getAttribute("y") ?? 0)).attr("fill", own.fill).attr("text-anchor", own.textAnchor)
        .attr("font-size", own.fontSize).attr("font-weight", own.fontWeight).text(text.textContent);
    }
  }

  const markup = (app) => new XMLSerializer().serializeToString(picture(app));

  function download(blob, name) {
    const link = fasttc.base.el("a", { download: name, href: URL.createObjectURL(blob) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  const svgBlob = (app) => new Blob([markup(app)], { type: "image/svg+xml" });

  /** The picture as PNG, two pixels to one. */
  async function pngBlob(app) {
    const url = URL.createObjectURL(svgBlob(app)), image = new Image();
    image.src = url;
    await image.decode();
    URL.revokeObjectURL(url);
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }

  const stateBlob = () => new Blob([JSON.stringify(fasttc.state.content(), null, 1) + "\n"], { type: "application/json" });

  function start(app) {
    const menu = document.getElementById("export"), file = document.getElementById("state-file");
    const on = (id, action) => document.getElementById(id).addEventListener("click", async () => {
      menu.open = false;
      try {
        await action();
      } catch (error) {
        app.say(`Not exported: ${error.message}`);
      }
    });
    on("export-svg", () => download(svgBlob(app), `${app.data.name}.svg`));
    on("export-png", async () => download(await pngBlob(app), `${app.data.name}.png`));
    on("export-state", () => download(stateBlob(), `${app.data.name}.supernodes.json`));
    on("import-state", () => file.click());
    file.addEventListener("change", async () => {
      try {
        if (file.files.length) app.read(JSON.parse(await file.files[0].text()));
      } catch (error) {
        app.say(`Not read: ${error.message}`);
      }
      file.value = "";
    });
    document.addEventListener("click", (event) => { if (!menu.contains(event.target)) menu.open = false; });
  }

  return { start, markup, pngBlob, stateBlob };
})();
