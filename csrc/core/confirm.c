#include "core/confirm.h"

#include <stdlib.h>
#include <string.h>

enum { FIRST_CAP = 64, DEFAULT_WINDOW = 65536 };

void mr_confirms_init(mr_confirms *c) {
  *c = (mr_confirms){.base = 1, .next = 1, .window = DEFAULT_WINDOW};
}

void mr_confirms_free(mr_confirms *c) {
  free(c->slots);
  c->slots = NULL;
  c->cap = 0;
}

static uint8_t *slot(const mr_confirms *c, uint64_t seq) { return &c->slots[seq & (c->cap - 1)]; }

static bool is_settled(uint8_t state) { return state != MR_PENDING && state != MR_RETURNED; }

static mr_status grow(mr_confirms *c) {
  mr_confirms bigger = *c;
  bigger.cap = c->cap ? c->cap * 2 : FIRST_CAP;
  bigger.slots = malloc(bigger.cap);
  if (!bigger.slots) return MR_NO_MEMORY;
  for (uint64_t seq = c->base; seq < c->next; seq++) *slot(&bigger, seq) = *slot(c, seq);
  free(c->slots);
  *c = bigger;
  return MR_OK;
}

mr_status mr_confirms_admit(mr_confirms *c) {
  uint64_t held = c->next - c->base;
  if (c->window && held >= c->window) return MR_WINDOW_FULL;
  return held < c->cap ? MR_OK : grow(c);
}

uint64_t mr_confirms_add(mr_confirms *c) {
  *slot(c, c->next) = MR_PENDING;
  c->unsettled++;
  return c->next++;
}

static bool is_held(const mr_confirms *c, uint64_t seq) { return seq >= c->base && seq < c->next; }

bool mr_confirms_returned(mr_confirms *c, uint64_t seq) {
  if (!is_held(c, seq) || *slot(c, seq) != MR_PENDING) return false;
  *slot(c, seq) = MR_RETURNED;
  return true;
}

const char *mr_confirms_settle(const mr_confirms *c, uint64_t tag, bool multiple, bool nack,
                               mr_confirm_cursor *cursor) {
  if (tag == 0 && multiple) tag = c->next - 1;
  if (tag >= c->next) return "a confirm of a publish that was never sent";
  if (!multiple && (!is_held(c, tag) || is_settled(*slot(c, tag))))
    return "a second confirm of the same publish";
  *cursor = (mr_confirm_cursor){.at = multiple ? c->base : tag, .last = tag, .nack = nack};
  return NULL;
}

static mr_outcome outcome_of(uint8_t state, bool nack) {
  if (nack) return MR_NACKED;
  return state == MR_RETURNED ? MR_UNROUTABLE : MR_ACKED;
}

/* The end of the run of unsettled slots that share the fate of `first`. Only acks come in runs:
 * every failure is reported by itself. */
static uint64_t run_end(const mr_confirms *c, uint64_t first, uint64_t last, mr_outcome outcome) {
  if (outcome != MR_ACKED) return first;
  uint64_t end = first;
  while (end < last && *slot(c, end + 1) == MR_PENDING) end++;
  return end;
}

static void advance(mr_confirms *c) {
  while (c->base < c->next && is_settled(*slot(c, c->base))) c->base++;
}

bool mr_confirms_step(mr_confirms *c, mr_confirm_cursor *cursor, uint64_t *first, uint64_t *last,
                      mr_outcome *outcome) {
  uint64_t at = cursor->at < c->base ? c->base : cursor->at;
  while (at <= cursor->last && is_settled(*slot(c, at))) at++;
  if (at > cursor->last) {
    cursor->at = at;
    return false;
  }
  *first = at;
  *outcome = outcome_of(*slot(c, at), cursor->nack);
  *last = run_end(c, at, cursor->last, *outcome);
  for (uint64_t seq = at; seq <= *last; seq++) *slot(c, seq) = (uint8_t)*outcome;
  c->unsettled -= *last - at + 1;
  cursor->at = *last + 1;
  if (at == c->base) advance(c);
  return true;
}

mr_outcome mr_confirms_outcome(const mr_confirms *c, uint64_t seq) {
  if (seq < c->base) return MR_ACKED;
  return seq < c->next && c->slots ? (mr_outcome)*slot(c, seq) : MR_LOST;
}
