/* The consumers of a channel, found by tag for each delivery. */
#include <stdlib.h>
#include <string.h>

#include "core/engine.h"

enum { FIRST_CAP = 2 };

static uint32_t hash_of(amqp_bytes_t tag) {
  uint32_t hash = 2166136261u; /* FNV-1a */
  for (size_t i = 0; i < tag.len; i++) hash = (hash ^ ((const uint8_t *)tag.bytes)[i]) * 16777619u;
  return hash;
}

static bool is_tagged(const mr_consumer *c, amqp_bytes_t tag) {
  return c->tag_len == tag.len && memcmp(c->tag, tag.bytes, tag.len) == 0;
}

/* While a cancelled consumer and its successor share a tag, what arrives belongs to the first. */
static size_t find_among_all(mr_channel *ch, amqp_bytes_t tag) {
  uint32_t hash = hash_of(tag);
  size_t found = SIZE_MAX;
  for (size_t i = 0; i < ch->n_consumers; i++) {
    const mr_consumer *c = &ch->consumers[i];
    if (c->hash != hash || !is_tagged(c, tag)) continue;
    found = i;
    if (c->cancelling) break;
  }
  return found;
}

mr_consumer *mr_consumers_find(mr_channel *ch, amqp_bytes_t tag) {
  if (tag.len == 0) return NULL;
  /* Deliveries come in runs for one consumer. */
  size_t i = ch->last_consumer;
  if (i >= ch->n_consumers || !is_tagged(&ch->consumers[i], tag)) i = find_among_all(ch, tag);
  if (i == SIZE_MAX) return NULL;
  ch->last_consumer = i;
  return &ch->consumers[i];
}

void mr_consumers_cancel(mr_channel *ch, amqp_bytes_t tag) {
  mr_consumer *c = mr_consumers_find(ch, tag);
  if (c) c->cancelling = true;
}

static mr_status make_room(mr_channel *ch) {
  if (ch->consumers && ch->n_consumers < ch->cap_consumers) return MR_OK;
  size_t cap = ch->cap_consumers ? ch->cap_consumers * 2 : FIRST_CAP;
  mr_consumer *consumers = realloc(ch->consumers, cap * sizeof *consumers);
  if (!consumers) return MR_NO_MEMORY;
  ch->consumers = consumers;
  ch->cap_consumers = cap;
  return MR_OK;
}

mr_status mr_consumers_add(mr_channel *ch, amqp_bytes_t tag, bool no_ack, uint32_t ref) {
  if (tag.len == 0 || tag.len > MR_SHORTSTR_MAX) return MR_BAD_ARGUMENT;
  const mr_consumer *old = mr_consumers_find(ch, tag);
  if (old && !old->cancelling) return MR_BAD_ARGUMENT;
  mr_status status = make_room(ch);
  if (status != MR_OK) return status;
  mr_consumer *c = &ch->consumers[ch->n_consumers++];
  *c = (mr_consumer){
      .tag_len = (uint8_t)tag.len, .no_ack = no_ack, .hash = hash_of(tag), .ref = ref};
  memcpy(c->tag, tag.bytes, tag.len);
  return MR_OK;
}

static void drop(mr_channel *ch, size_t i) {
  ch->consumers[i] = ch->consumers[--ch->n_consumers];
  ch->last_consumer = SIZE_MAX;
}

void mr_consumers_remove(mr_channel *ch, amqp_bytes_t tag) {
  const mr_consumer *c = mr_consumers_find(ch, tag);
  if (c) drop(ch, (size_t)(c - ch->consumers));
}

/* A cancel that crossed one of the broker's finds no consumer, or one that took the tag since. */
void mr_consumers_cancelled(mr_channel *ch, amqp_bytes_t tag) {
  size_t i = find_among_all(ch, tag);
  if (i != SIZE_MAX && ch->consumers[i].cancelling) drop(ch, i);
}

void mr_consumers_undo_add(mr_channel *ch) { ch->n_consumers--; }
