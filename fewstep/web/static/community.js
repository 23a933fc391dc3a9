// What visitors share: the gallery, the reviews, and who you are here. Tells "recipe".

import { api } from "./api.js";
import { $, el, icon, onClick, tell } from "./dom.js";
import { confirmDeletion } from "./shell.js";
import { toast } from "./status.js";

const PAGE = 24;
const STARS = [1, 2, 3, 4, 5];
const nameOf = ({ nickname, mine }) => (nickname || "Someone") + (mine ? " (you)" : "");
const call = (method, path, body) => api(method, path, body, ({ message }) => toast(`${message} Trying again.`));

let next = null; // where the gallery goes on

// The header shows who you are; the page works without knowing.
const refreshMe = () => loadMe().catch(() => {});
refreshMe();

export async function keep(id) {
  await call("POST", "/api/pictures", { id });
  refreshMe();
}

const when = (iso) => el("time", { dateTime: iso }, new Date(iso).toLocaleDateString("en", { dateStyle: "medium" }));

function stars(rating) {
  const row = el("span", { className: "rated", role: "img", ariaLabel: `${rating} of 5 stars` });
  row.append(...STARS.map(() => icon("star")));
  STARS.forEach((star, i) => row.children[i].classList.toggle("on", star <= Math.round(rating)));
  return row;
}

// One line for a list that is loading, empty or failed.
function state(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

// --- the gallery

export function openGallery() {
  $("gallery-list").replaceChildren();
  next = null;
  $("gallery").showModal();
  loadGallery();
}
onClick("gallery-open", openGallery);
onClick("gallery-more", loadGallery);

async function loadGallery() {
  const more = $("gallery-more");
  more.hidden = true;
  if (!next) state("gallery-state", "Loading");
  try {
    const before = next ? `&before=${encodeURIComponent(next)}` : "";
    const page = await call("GET", `/api/pictures?limit=${PAGE}${before}`);
    next = page.next;
    $("gallery-list").append(...page.pictures.map(card));
    noteGallery();
    more.textContent = "Show more";
    more.hidden = !next;
  } catch (error) {
    state("gallery-state", error.message);
    more.textContent = "Try again";
    more.hidden = false;
  }
}

function noteGallery() {
  const empty = $("gallery-list").childElementCount === 0;
  state("gallery-state", empty ? "Nothing here yet. Paint something and press Keep." : "");
}

function card(picture) {
  const { recipe, url, width, height, created, mine } = picture;
  const about = [`${recipe.steps} steps`, `seed ${recipe.seed}`, recipe.style].filter(Boolean).join(" · ");
  const use = el("button", { className: "use", title: "Take these settings" },
    el("img", { src: url, alt: "", loading: "lazy", width, height }),
    el("span", { className: "prompt" }, recipe.prompt),
    el("span", { className: "note" }, about));
  use.addEventListener("click", () => {
    $("gallery").close();
    tell("recipe", recipe);
  });
  const by = el("p", { className: "by" }, el("b", {}, nameOf(picture)), when(created));
  const item = el("li", { className: "gallery-item" }, use, by);
  if (mine) {
    const remove = el("button", { className: "icon remove", title: "Delete", ariaLabel: "Delete this picture" }, icon("trash"));
    remove.addEventListener("click", () => deletePicture(picture, item));
    item.append(remove);
  }
  return item;
}

async function deletePicture({ id }, item) {
  if (!(await confirmDeletion("Delete this picture?", "It leaves the gallery for everyone."))) return;
  try {
    await call("DELETE", `/api/pictures/${encodeURIComponent(id)}`);
    item.remove();
    noteGallery();
    refreshMe();
  } catch (error) {
    toast(error.message);
  }
}

// --- reviews

for (const rating of STARS) {
  const title = `${rating} of 5 stars`;
  const input = el("input", { type: "radio", name: "rating", value: rating, required: true, ariaLabel: title });
  $("stars").append(el("label", { title }, input, icon("star")));
}

$("review-form").addEventListener("input", (event) => (event.currentTarget.dataset.touched = "yes"));

onClick("reviews-open", async () => {
  delete $("review-form").dataset.touched;
  $("reviews").showModal();
  $("reviews-list").replaceChildren();
  state("reviews-state", "Loading");
  try {
    await Promise.all([loadReviews(), loadMe()]);
  } catch (error) {
    state("reviews-state", error.message);
  }
});

async function loadReviews() {
  const { reviews, average, count } = await call("GET", "/api/reviews");
  state("reviews-state", count ? "" : "No reviews yet. Yours would be the first.");
  $("average").hidden = !count;
  if (count) {
    const note = el("span", { className: "note" }, count === 1 ? "1 review" : `${count} reviews`);
    $("average").replaceChildren(el("strong", {}, average.toFixed(1)), stars(average), note);
  }
  $("reviews-list").replaceChildren(...reviews.map((review) => {
    const by = el("p", { className: "by" }, el("b", {}, nameOf(review)), stars(review.rating), when(review.created));
    return el("li", { className: "review" }, by, el("p", {}, review.text));
  }));
}

$("review-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const rating = Number(new FormData(event.target).get("rating"));
  $("review-send").disabled = true;
  try {
    await call("PUT", "/api/review", { rating, text: $("review-text").value });
    delete event.target.dataset.touched;
    await Promise.all([loadReviews(), loadMe()]);
    toast("Thank you. Your review is saved.");
  } catch (error) {
    toast(error.message);
  }
  $("review-send").disabled = false;
});

// --- you

async function loadMe() {
  const { nickname, pictures, review } = await call("GET", "/api/me");
  $("you-name").textContent = nickname || "You";
  $("nickname").value = nickname;
  $("you-facts").textContent =
    pictures === 1 ? "1 of your pictures is in the gallery." : `${pictures} of your pictures are in the gallery.`;
  $("review-send").textContent = review ? "Save changes" : "Send review";
  if ($("review-form").dataset.touched) return; // what somebody writes meanwhile is theirs
  $("review-text").value = review?.text ?? "";
  for (const input of $("review-form").elements.rating) input.checked = Number(input.value) === review?.rating;
}

function noteNickname(text, bad) {
  $("nickname-note").textContent = text;
  $("nickname-note").classList.toggle("bad", bad);
}

onClick("you-open", () => {
  noteNickname("Shown beside the pictures you keep and your review. There is no password and no e-mail.", false);
  $("you").showModal();
  loadMe().catch((error) => noteNickname(error.message, true));
});

$("nickname-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await call("PUT", "/api/me", { nickname: $("nickname").value.trim() });
    await loadMe();
    noteNickname("Saved. This is how others see you.", false);
  } catch (error) {
    noteNickname(error.message, true);
  }
});

onClick("delete-data", async () => {
  const text = "Your nickname, the pictures you kept and your review are deleted from this server. There is no way back.";
  if (!(await confirmDeletion("Delete your data?", text))) return;
  try {
    await call("DELETE", "/api/me");
    toast("Your data is deleted. The page starts anew.");
    // The visitor that this page painted for is gone; the next load is a new one.
    setTimeout(() => location.reload(), 1500);
  } catch (error) {
    toast(error.message);
  }
});
