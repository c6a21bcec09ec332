/* The life of a channel: its number, opening, closing, and what it can be asked afterwards. */
#include <stdlib.h>
#include <string.h>

#include "core/engine.h"

/* A number that the broker has closed rests until it has closed so many others, or there is no other left:
 * RabbitMQ closes a channel again at each look at its timeouts until it reads our answer, and on a channel that
 * has just begun that would be taken for its own end. */
enum { FIRST_CAP = 16, LAST_CHANNEL = 65535, RESTING = 256 };

/* ---- numbers ---- */

mr_channel *mr_find_channel(const mr_engine *e, uint16_t id) {
  return id < e->cap_channels ? e->channels[id] : NULL;
}

bool mr_is_retired(const mr_engine *e, uint16_t id) {
  return id < e->cap_channels && e->retired[id] != 0;
}

static bool rests(const mr_engine *e, uint32_t id) {
  return e->retired[id] && e->retirements - e->retired[id] < RESTING;
}

static mr_status make_room(mr_engine *e, uint32_t id) {
  if (id < e->cap_channels) return MR_OK;
  size_t cap = e->cap_channels ? e->cap_channels * 2 : FIRST_CAP;
  mr_channel **channels = realloc(e->channels, cap * sizeof(mr_channel *));
  if (!channels) return MR_NO_MEMORY;
  e->channels = channels;
  uint32_t *retired = realloc(e->retired, cap * sizeof(uint32_t));
  if (!retired) return MR_NO_MEMORY;
  e->retired = retired;
  for (size_t i = e->cap_channels; i < cap; i++) {
    channels[i] = NULL;
    retired[i] = 0;
  }
  e->cap_channels = cap;
  return MR_OK;
}

/* The lowest number that is free and does not rest; else the one that has rested longest. */
static mr_status free_number(mr_engine *e, uint16_t *id) {
  uint32_t max = e->tuned.channel_max ? e->tuned.channel_max : LAST_CHANNEL;
  uint32_t n = e->channel_hint, lowest = 0, rested = 0;
  for (; n <= max && n < e->cap_channels; n++) {
    if (e->channels[n]) continue;
    if (!lowest) lowest = n;
    if (!rests(e, n)) break;
    if (!rested || e->retired[n] < e->retired[rested]) rested = n;
  }
  if (n > max) n = rested;
  if (!n) return MR_NO_CHANNELS;
  e->channel_hint = lowest ? lowest : n;
  *id = (uint16_t)n;
  return make_room(e, n);
}

/* ---- life ---- */

static void free_channel(mr_channel *ch) {
  mr_calls_free(&ch->calls);
  mr_confirms_free(&ch->confirms);
  mr_acks_free(&ch->acks);
  mr_assembly_free(&ch->assembly);
  free(ch->consumers);
  free(ch);
}

/* The number is free again; the handle stays with the user, who can still ask for outcomes. */
void mr_channel_end(mr_channel *ch) {
  mr_engine *e = ch->engine;
  mr_forget_gathered(ch);
  e->channels[ch->id] = NULL;
  if (ch->ended_by_broker) e->retired[ch->id] = ++e->retirements;
  e->open_channels--;
  if (ch->id < e->channel_hint) e->channel_hint = ch->id;
  if (e->delivering == ch) e->delivering = NULL;
  if (e->cursor_channel == ch) e->cursor_channel = NULL;
  ch->engine = NULL;
  ch->state = MR_CH_CLOSED;
  mr_calls_free(&ch->calls);
  mr_assembly_free(&ch->assembly);
  ch->assembly = (mr_assembly){0};
  if (ch->released) free_channel(ch);
}

bool mr_takes_commands(const mr_channel *ch) {
  return ch->engine && ch->engine->state == MR_OPEN &&
         (ch->state == MR_CH_OPEN || ch->state == MR_CH_OPENING);
}

mr_status mr_channel_open(mr_engine *e, mr_channel **channel) {
  if (e->state != MR_OPEN) return MR_CLOSED;
  uint16_t id = 0;
  mr_status status = free_number(e, &id);
  if (status != MR_OK) return status;
  mr_channel *ch = calloc(1, sizeof *ch);
  if (!ch) return MR_NO_MEMORY;
  ch->engine = e;
  ch->id = id;
  mr_confirms_init(&ch->confirms);
  amqp_channel_open_t open = {0};
  status = mr_calls_reserve(&ch->calls);
  if (status == MR_OK) status = mr_send_method(e, id, AMQP_CHANNEL_OPEN_METHOD, &open);
  if (status != MR_OK) {
    free_channel(ch);
    return status;
  }
  mr_calls_push(&ch->calls, (mr_call_entry){.reply = AMQP_CHANNEL_OPEN_OK_METHOD});
  e->channels[id] = ch;
  e->retired[id] = 0;
  e->open_channels++;
  *channel = ch;
  return MR_OK;
}

mr_status mr_channel_close(mr_channel *ch, uint16_t code, const char *text) {
  if (!mr_takes_commands(ch)) return MR_CLOSED;
  mr_status status = mr_flush_acks(ch);
  if (status == MR_OK) status = mr_calls_reserve(&ch->calls);
  if (status != MR_OK) return status;
  amqp_channel_close_t close = {.reply_code = code, .reply_text = amqp_cstring_bytes(text)};
  if (close.reply_text.len > MR_SHORTSTR_MAX) close.reply_text.len = MR_SHORTSTR_MAX;
  status = mr_send_method(ch->engine, ch->id, AMQP_CHANNEL_CLOSE_METHOD, &close);
  if (status != MR_OK) return status;
  mr_calls_push(&ch->calls, (mr_call_entry){.reply = AMQP_CHANNEL_CLOSE_OK_METHOD});
  ch->state = MR_CH_CLOSING;
  return MR_OK;
}

void mr_channel_release(mr_channel *ch) {
  if (!ch) return;
  if (!ch->engine) {
    free_channel(ch);
    return;
  }
  ch->released = true;
  ch->user = NULL;
  mr_channel_close(ch, AMQP_REPLY_SUCCESS, "released");
}

/* ---- getters ---- */

uint16_t mr_channel_id(const mr_channel *ch) { return ch->id; }
bool mr_channel_is_open(const mr_channel *ch) { return mr_takes_commands(ch); }
void mr_channel_set_user(mr_channel *ch, void *user) { ch->user = user; }
void *mr_channel_user(const mr_channel *ch) { return ch->user; }
uint16_t mr_channel_prefetch(const mr_channel *ch) { return ch->prefetch; }
void mr_channel_set_window(mr_channel *ch, uint32_t window) { ch->confirms.window = window; }
bool mr_channel_is_confirm(const mr_channel *ch) { return ch->confirm; }
uint64_t mr_confirm_oldest(const mr_channel *ch) { return ch->confirms.base; }
uint64_t mr_confirm_next(const mr_channel *ch) { return ch->confirms.next; }
uint64_t mr_confirm_capacity(const mr_channel *ch) { return ch->confirms.cap; }
uint64_t mr_confirm_held(const mr_channel *ch) { return ch->confirms.next - ch->confirms.base; }
mr_status mr_confirm_reserve(mr_channel *ch) { return mr_confirms_admit(&ch->confirms); }

uint64_t mr_confirm_unsettled(const mr_channel *ch) {
  return ch->state == MR_CH_CLOSED ? 0 : ch->confirms.unsettled;
}

uint64_t mr_confirm_lost(const mr_channel *ch) {
  return ch->state == MR_CH_CLOSED ? ch->confirms.unsettled : 0;
}

mr_outcome mr_confirm_outcome(const mr_channel *ch, uint64_t seq) {
  mr_outcome outcome = mr_confirms_outcome(&ch->confirms, seq);
  bool unsettled = outcome == MR_PENDING || outcome == MR_RETURNED;
  return unsettled && ch->state == MR_CH_CLOSED ? MR_LOST : outcome;
}
