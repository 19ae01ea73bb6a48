// The map: whatever point the pointer or the keyboard is at shows its crop; one point is in the tab order at a time.
const map = document.querySelector(".map");
const points = [...map.querySelectorAll("[data-label]")];
const detail = map.querySelector(".detail");
const pick = document.getElementById("class");
const places = points.map((point) => [point.cx ?? point.x, point.cy ?? point.y].map((length) => length.baseVal.value));
let current = 0;

function show(index) {
  points[current].classList.remove("shown");
  points[current].tabIndex = -1;
  current = index;
  points[current].classList.add("shown");
  points[current].tabIndex = 0;
  const lines = Math.ceil(points.length / columns);
  const [column, line] = [index % columns, Math.floor(index / columns)];
  const share = (place, of) => `${of > 1 ? (100 * place) / (of - 1) : 0}%`;
  detail.querySelector(".thumb").style.backgroundPosition = `${share(column, columns)} ${share(line, lines)}`;
  detail.querySelector("p").textContent = points[index].getAttribute("aria-label");
  detail.hidden = false;
  const [x, y] = [(places[index][0] / 1000) * map.clientWidth, (places[index][1] / 700) * map.clientHeight];
  const left = x < map.clientWidth / 2 ? x + 12 : x - detail.offsetWidth - 12;
  const top = y - detail.offsetHeight / 2;
  detail.style.left = `${Math.max(0, Math.min(left, map.clientWidth - detail.offsetWidth))}px`;
  detail.style.top = `${Math.max(0, Math.min(top, map.clientHeight - detail.offsetHeight))}px`;
}

function hide() {
  detail.hidden = true;
  points[current].classList.remove("shown");
}

function nearest(dx, dy) {
  // The nearest point within 45 degrees of the direction.
  const [x, y] = places[current];
  let best = current, least = Infinity;
  places.forEach(([px, py], index) => {
    const along = (px - x) * dx + (py - y) * dy, aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
    const distance = Math.hypot(px - x, py - y);
    if (along > 0 && along >= aside && distance < least && !points[index].classList.contains("faint")) [best, least] = [index, distance];
  });
  return best;
}

const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
points.forEach((point, index) => {
  point.addEventListener("pointerenter", () => show(index));
  point.addEventListener("focus", () => show(index));
  point.addEventListener("blur", hide);
});
map.addEventListener("pointerleave", hide);
map.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  if (!(event.key in steps)) return;
  event.preventDefault();
  points[nearest(...steps[event.key])].focus();
});
pick?.addEventListener("change", () => {
  points.forEach((point) => point.classList.toggle("faint", pick.value !== "" && point.dataset.label !== pick.value));
});
