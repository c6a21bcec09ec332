#include "core/ack.h"

#include <stdlib.h>
#include <string.h>

/* The life of a delivery. A broker answers an ack of a tag it does not hold by closing the channel
 * (406), so each state says exactly what the broker knows. */
enum {
  OUTSTANDING,
  GATHERED, /* acked here, not written */
  DONE,     /* the broker was told */
  IN_TX     /* told, in a transaction that is still open */
};

enum { FIRST_CAP = 16, COMPACT_AT = 64 };

void mr_acks_free(mr_acks *a) {
  free(a->items);
  a->items = NULL;
  a->cap = a->head = a->tail = 0;
}

static void drop_done_head(mr_acks *a) {
  while (a->head < a->tail && a->items[a->head].state == DONE) a->head++;
  if (a->head == a->tail) a->head = a->tail = 0;
}

/* Squeezes settled deliveries out, so that one that is never settled cannot make the window grow. */
static void compact(mr_acks *a) {
  size_t to = 0;
  for (size_t i = a->head; i < a->tail; i++)
    if (a->items[i].state != DONE) a->items[to++] = a->items[i];
  a->head = a->hint = 0;
  a->tail = to;
}

static mr_status make_room(mr_acks *a) {
  if (a->tail < a->cap) return MR_OK;
  if (a->cap >= COMPACT_AT) compact(a);
  if (a->tail <= a->cap / 2 && a->cap) return MR_OK;
  size_t cap = a->cap ? a->cap * 2 : FIRST_CAP;
  mr_delivery *items = realloc(a->items, cap * sizeof *items);
  if (!items) return a->tail < a->cap ? MR_OK : MR_NO_MEMORY;
  a->items = items;
  a->cap = cap;
  return MR_OK;
}

mr_status mr_acks_add(mr_acks *a, uint64_t tag, bool no_ack) {
  if (!no_ack) {
    if (tag <= a->last_held) return MR_BAD_ARGUMENT;
    mr_status status = make_room(a);
    if (status != MR_OK) return status;
    a->items[a->tail++] = (mr_delivery){tag, OUTSTANDING};
    a->outstanding++;
    a->last_held = tag;
  }
  if (tag > a->last_tag) a->last_tag = tag;
  return MR_OK;
}

/* The first delivery whose tag is not below `tag`. */
static size_t lower_bound(const mr_acks *a, uint64_t tag) {
  size_t low = a->head, high = a->tail;
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    if (a->items[middle].tag < tag)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

static mr_delivery *find(const mr_acks *a, uint64_t tag) {
  if (a->head == a->tail || tag < a->items[a->head].tag) return NULL;
  uint64_t offset = tag - a->items[a->head].tag;
  size_t guess = a->head + (size_t)offset; /* right unless there are gaps */
  if (offset < a->tail - a->head && a->items[guess].tag == tag) return &a->items[guess];
  size_t i = lower_bound(a, tag);
  return i < a->tail && a->items[i].tag == tag ? &a->items[i] : NULL;
}

static mr_status look(const mr_acks *a, uint64_t tag, const mr_delivery *d) {
  if (tag == 0 || tag > a->last_tag) return MR_UNKNOWN_TAG;
  if (!d && tag <= a->recovered) return MR_CLOSED;
  return d && d->state == OUTSTANDING ? MR_OK : MR_SETTLED;
}

mr_status mr_acks_look(const mr_acks *a, uint64_t tag) { return look(a, tag, find(a, tag)); }

mr_status mr_acks_settle(mr_acks *a, uint64_t tag, mr_settle_kind kind, bool requeue,
                         mr_settlement *out) {
  mr_delivery *d = find(a, tag);
  mr_status status = look(a, tag, d);
  if (status != MR_OK) return status;
  a->outstanding--;
  if (kind == MR_SETTLE_ACK && !a->tx) {
    d->state = GATHERED;
    a->gathered++;
    a->hint = 0;
    return MR_OK;
  }
  d->state = a->tx ? IN_TX : DONE;
  drop_done_head(a);
  *out = (mr_settlement){.tag = tag, .kind = kind, .requeue = requeue};
  return MR_FLUSH;
}

static size_t end_of(const mr_acks *a, uint64_t tag) {
  return tag ? lower_bound(a, tag + 1) : a->tail;
}

uint64_t mr_acks_last_outstanding(const mr_acks *a, uint64_t tag) {
  for (size_t i = end_of(a, tag); i > a->head; i--)
    if (a->items[i - 1].state == OUTSTANDING) return a->items[i - 1].tag;
  return 0;
}

static void mark_upto(mr_acks *a, uint64_t tag, uint8_t state) {
  size_t end = end_of(a, tag);
  for (size_t i = a->head; i < end; i++) {
    if (a->items[i].state != OUTSTANDING) continue;
    a->items[i].state = state;
    a->outstanding--;
    if (state == GATHERED) a->gathered++;
  }
  a->hint = 0;
}

void mr_acks_settle_upto(mr_acks *a, uint64_t tag) {
  mark_upto(a, tag, a->tx ? IN_TX : DONE);
  drop_done_head(a);
}

void mr_acks_gather_upto(mr_acks *a, uint64_t tag) { mark_upto(a, tag, GATHERED); }

/* How many gathered acks lead the window, and the last of them: what one ack with `multiple` can
 * settle without touching a delivery that somebody still works on. */
static size_t leading(const mr_acks *a, size_t *last) {
  size_t n = 0;
  for (size_t i = a->head; i < a->tail; i++) {
    uint8_t state = a->items[i].state;
    if (state == OUTSTANDING) break;
    if (state != GATHERED) continue;
    *last = i;
    n++;
  }
  return n;
}

static void take_leading(mr_acks *a, size_t last) {
  for (size_t i = a->head; i <= last; i++)
    if (a->items[i].state == GATHERED) a->items[i].state = DONE;
}

bool mr_acks_next(mr_acks *a, mr_settlement *out) {
  if (a->gathered == 0) return false;
  size_t at = a->head;
  size_t n = leading(a, &at);
  if (n == 0) {
    if (at < a->hint) at = a->hint;
    while (a->items[at].state != GATHERED) at++;
    a->items[at].state = DONE;
    a->hint = at + 1;
    n = 1;
  } else {
    take_leading(a, at);
  }
  a->gathered -= n;
  if (a->gathered == 0) a->hint = 0;
  *out = (mr_settlement){.tag = a->items[at].tag, .kind = MR_SETTLE_ACK, .multiple = n > 1};
  drop_done_head(a);
  return true;
}

void mr_acks_clear(mr_acks *a) {
  a->head = a->tail = a->outstanding = a->gathered = a->hint = 0;
  a->recovered = a->last_tag;
}

/* The broker takes the commands of a channel in order, so what was asked holds for all that is sent
 * from now on. */
void mr_acks_tx_end(mr_acks *a, bool commit) {
  for (size_t i = a->head; i < a->tail; i++) {
    if (a->items[i].state != IN_TX) continue;
    a->items[i].state = commit ? DONE : OUTSTANDING;
    if (!commit) a->outstanding++;
  }
  drop_done_head(a);
}
