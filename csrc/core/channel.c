/* Channels: opening, calls and their answers, closing from either side. */
#include <stdlib.h>
#include <string.h>

#include "core/engine.h"

enum {
  FIRST_CAP = 16,
  LAST_CHANNEL = 65535,
  NAMES_ROOM = 1024 /* what a method holds beside its arguments table, at most */
};

/* ---- numbers ---- */

mr_channel *mr_find_channel(const mr_engine *e, uint16_t id) {
  return id < e->cap_channels ? e->channels[id] : NULL;
}

static mr_status make_room(mr_engine *e, uint32_t id) {
  if (id < e->cap_channels) return MR_OK;
  size_t cap = e->cap_channels ? e->cap_channels * 2 : FIRST_CAP;
  mr_channel **channels = realloc(e->channels, cap * sizeof(mr_channel *));
  if (!channels) return MR_NO_MEMORY;
  for (size_t i = e->cap_channels; i < cap; i++) channels[i] = NULL;
  e->channels = channels;
  e->cap_channels = cap;
  return MR_OK;
}

static mr_status free_number(mr_engine *e, uint16_t *id) {
  uint32_t max = e->tuned.channel_max ? e->tuned.channel_max : LAST_CHANNEL;
  uint32_t n = e->channel_hint;
  while (n <= max && n < e->cap_channels && e->channels[n]) n++;
  if (n > max) return MR_NO_CHANNELS;
  e->channel_hint = n;
  *id = (uint16_t)n;
  return make_room(e, n);
}

/* ---- life ---- */

void mr_channel_free(mr_channel *ch) {
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
  e->open_channels--;
  if (ch->id < e->channel_hint) e->channel_hint = ch->id;
  if (e->delivering == ch) e->delivering = NULL;
  if (e->cursor_channel == ch) e->cursor_channel = NULL;
  ch->engine = NULL;
  ch->state = MR_CH_CLOSED;
  mr_calls_free(&ch->calls);
  mr_assembly_free(&ch->assembly);
  ch->assembly = (mr_assembly){0};
  if (ch->released) mr_channel_free(ch);
}

static bool takes_commands(const mr_channel *ch) {
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
    mr_channel_free(ch);
    return status;
  }
  mr_calls_push(&ch->calls, (mr_call_entry){.reply = AMQP_CHANNEL_OPEN_OK_METHOD});
  e->channels[id] = ch;
  e->open_channels++;
  *channel = ch;
  return MR_OK;
}

mr_status mr_channel_close(mr_channel *ch, uint16_t code, const char *text) {
  if (!takes_commands(ch)) return MR_CLOSED;
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
    mr_channel_free(ch);
    return;
  }
  ch->released = true;
  ch->user = NULL;
  mr_channel_close(ch, AMQP_REPLY_SUCCESS, "released");
}

/* ---- getters ---- */

uint16_t mr_channel_id(const mr_channel *ch) { return ch->id; }
bool mr_channel_is_open(const mr_channel *ch) { return takes_commands(ch); }
void mr_channel_set_user(mr_channel *ch, void *user) { ch->user = user; }
void *mr_channel_user(const mr_channel *ch) { return ch->user; }
uint16_t mr_channel_prefetch(const mr_channel *ch) { return ch->prefetch; }
void mr_channel_set_window(mr_channel *ch, uint32_t window) { ch->confirms.window = window; }
bool mr_channel_is_confirm(const mr_channel *ch) { return ch->confirm; }
uint64_t mr_confirm_oldest(const mr_channel *ch) { return ch->confirms.base; }
uint64_t mr_confirm_next(const mr_channel *ch) { return ch->confirms.next; }
uint64_t mr_confirm_capacity(const mr_channel *ch) { return ch->confirms.cap; }

uint64_t mr_confirm_unsettled(const mr_channel *ch) {
  return ch->state == MR_CH_CLOSED ? 0 : ch->confirms.unsettled;
}

mr_outcome mr_confirm_outcome(const mr_channel *ch, uint64_t seq) {
  mr_outcome outcome = mr_confirms_outcome(&ch->confirms, seq);
  bool unsettled = outcome == MR_PENDING || outcome == MR_RETURNED;
  return unsettled && ch->state == MR_CH_CLOSED ? MR_LOST : outcome;
}

/* ---- calls ---- */

/* The arguments table of a method; NULL: it has none. */
static const amqp_table_t *arguments_of(amqp_method_number_t method, const void *decoded) {
  switch (method) {
    case AMQP_EXCHANGE_DECLARE_METHOD:
      return &((const amqp_exchange_declare_t *)decoded)->arguments;
    case AMQP_EXCHANGE_BIND_METHOD: return &((const amqp_exchange_bind_t *)decoded)->arguments;
    case AMQP_EXCHANGE_UNBIND_METHOD: return &((const amqp_exchange_unbind_t *)decoded)->arguments;
    case AMQP_QUEUE_DECLARE_METHOD: return &((const amqp_queue_declare_t *)decoded)->arguments;
    case AMQP_QUEUE_BIND_METHOD: return &((const amqp_queue_bind_t *)decoded)->arguments;
    case AMQP_QUEUE_UNBIND_METHOD: return &((const amqp_queue_unbind_t *)decoded)->arguments;
    case AMQP_BASIC_CONSUME_METHOD: return &((const amqp_basic_consume_t *)decoded)->arguments;
    default: return NULL;
  }
}

static bool is_nowait(amqp_method_number_t method, const void *decoded) {
  switch (method) {
    case AMQP_EXCHANGE_DECLARE_METHOD: return ((const amqp_exchange_declare_t *)decoded)->nowait;
    case AMQP_EXCHANGE_DELETE_METHOD: return ((const amqp_exchange_delete_t *)decoded)->nowait;
    case AMQP_EXCHANGE_BIND_METHOD: return ((const amqp_exchange_bind_t *)decoded)->nowait;
    case AMQP_EXCHANGE_UNBIND_METHOD: return ((const amqp_exchange_unbind_t *)decoded)->nowait;
    case AMQP_QUEUE_DECLARE_METHOD: return ((const amqp_queue_declare_t *)decoded)->nowait;
    case AMQP_QUEUE_BIND_METHOD: return ((const amqp_queue_bind_t *)decoded)->nowait;
    case AMQP_QUEUE_PURGE_METHOD: return ((const amqp_queue_purge_t *)decoded)->nowait;
    case AMQP_QUEUE_DELETE_METHOD: return ((const amqp_queue_delete_t *)decoded)->nowait;
    case AMQP_BASIC_CONSUME_METHOD: return ((const amqp_basic_consume_t *)decoded)->nowait;
    case AMQP_CONFIRM_SELECT_METHOD: return ((const amqp_confirm_select_t *)decoded)->nowait;
    default: return false;
  }
}

/* Methods that mr_call may send: those of a client that bring no content and settle nothing. */
static bool is_callable(amqp_method_number_t method) {
  switch (method) {
    case AMQP_CHANNEL_FLOW_METHOD:
    case AMQP_EXCHANGE_DECLARE_METHOD:
    case AMQP_EXCHANGE_DELETE_METHOD:
    case AMQP_EXCHANGE_BIND_METHOD:
    case AMQP_EXCHANGE_UNBIND_METHOD:
    case AMQP_QUEUE_DECLARE_METHOD:
    case AMQP_QUEUE_BIND_METHOD:
    case AMQP_QUEUE_UNBIND_METHOD:
    case AMQP_QUEUE_PURGE_METHOD:
    case AMQP_QUEUE_DELETE_METHOD:
    case AMQP_BASIC_QOS_METHOD:
    case AMQP_BASIC_CANCEL_METHOD:
    case AMQP_BASIC_RECOVER_METHOD:
    case AMQP_BASIC_RECOVER_ASYNC_METHOD:
    case AMQP_TX_SELECT_METHOD:
    case AMQP_TX_COMMIT_METHOD:
    case AMQP_TX_ROLLBACK_METHOD:
    case AMQP_CONFIRM_SELECT_METHOD: return true;
    default: return false;
  }
}

/* Gathered acks must reach the broker before these methods do: a recover would requeue what was
 * acked, and inside a transaction an ack means something else. */
static bool flushes_acks(amqp_method_number_t method) {
  return method == AMQP_BASIC_CANCEL_METHOD || method == AMQP_BASIC_RECOVER_METHOD ||
         method == AMQP_BASIC_RECOVER_ASYNC_METHOD || method >> 16 == AMQP_TX_CLASS;
}

/* The smallest prefetch in force decides how many acks may be gathered. */
static void note_prefetch(mr_channel *ch, uint16_t count) {
  if (ch->n_consumers == 0)
    ch->prefetch = count;
  else if (count && (!ch->prefetch || count < ch->prefetch))
    ch->prefetch = count;
}

static void note_sent(mr_channel *ch, amqp_method_number_t method, const void *decoded) {
  switch (method) {
    case AMQP_BASIC_QOS_METHOD:
      note_prefetch(ch, ((const amqp_basic_qos_t *)decoded)->prefetch_count);
      break;
    case AMQP_BASIC_RECOVER_METHOD:
      ch->recovering++;
      mr_acks_clear(&ch->acks);
      break;
    case AMQP_BASIC_RECOVER_ASYNC_METHOD: mr_acks_clear(&ch->acks); break;
    case AMQP_BASIC_CANCEL_METHOD:
      mr_consumers_cancel(ch, ((const amqp_basic_cancel_t *)decoded)->consumer_tag);
      break;
    case AMQP_TX_SELECT_METHOD: ch->acks.tx = true; break;
    case AMQP_TX_COMMIT_METHOD: mr_acks_tx_end(&ch->acks, true); break;
    case AMQP_TX_ROLLBACK_METHOD: mr_acks_tx_end(&ch->acks, false); break;
    case AMQP_CONFIRM_SELECT_METHOD: ch->confirm = true; break;
    default: break;
  }
}

static mr_status send_call(mr_channel *ch, amqp_method_number_t method, void *decoded,
                           mr_call_entry entry) {
  const amqp_table_t *arguments = arguments_of(method, decoded);
  if (arguments && mr_table_depth_ok(arguments) != MR_OK) return MR_BAD_ARGUMENT;
  bool answered = entry.reply && !is_nowait(method, decoded);
  mr_status status = answered ? mr_calls_reserve(&ch->calls) : MR_OK;
  if (status == MR_OK && flushes_acks(method)) status = mr_flush_acks(ch);
  if (status == MR_OK) status = mr_send_method(ch->engine, ch->id, method, decoded);
  if (status == MR_OK && answered) mr_calls_push(&ch->calls, entry);
  if (status != MR_TOO_LARGE) return status;
  /* rabbitmq-c does not say why; without a large table it is a short string over 255 bytes. */
  bool large = arguments && mr_table_size(arguments) + NAMES_ROOM > ch->engine->tuned.frame_max;
  return large ? MR_TOO_LARGE : MR_BAD_ARGUMENT;
}

/* A cancel without an answer would leave the engine guessing when the last delivery has come, so
 * the broker is asked to answer, and nobody is told. */
static mr_status send_cancel(mr_channel *ch, amqp_basic_cancel_t cancel) {
  mr_call_entry entry = {.reply = AMQP_BASIC_CANCEL_OK_METHOD, .silent = cancel.nowait};
  cancel.nowait = 0;
  return send_call(ch, AMQP_BASIC_CANCEL_METHOD, &cancel, entry);
}

mr_status mr_call(mr_channel *ch, amqp_method_number_t method, void *decoded) {
  if (!is_callable(method) || !decoded) return MR_BAD_ARGUMENT;
  if (!takes_commands(ch)) return MR_CLOSED;
  mr_call_entry entry = {.reply = mr_method_reply(method)};
  mr_status status = method == AMQP_BASIC_CANCEL_METHOD
                         ? send_cancel(ch, *(const amqp_basic_cancel_t *)decoded)
                         : send_call(ch, method, decoded, entry);
  if (status == MR_OK) note_sent(ch, method, decoded);
  return status;
}

mr_status mr_consume(mr_channel *ch, const amqp_basic_consume_t *consume, uint32_t ref) {
  if (!takes_commands(ch)) return MR_CLOSED;
  if (ref == 0) return MR_BAD_ARGUMENT;
  mr_status status = mr_consumers_add(ch, consume->consumer_tag, consume->no_ack, ref);
  if (status != MR_OK) return status;
  mr_call_entry entry = {.reply = AMQP_BASIC_CONSUME_OK_METHOD};
  status = send_call(ch, AMQP_BASIC_CONSUME_METHOD, (void *)(uintptr_t)consume, entry);
  if (status != MR_OK) mr_consumers_undo_add(ch);
  return status;
}

mr_status mr_get(mr_channel *ch, amqp_bytes_t queue, bool no_ack) {
  if (!takes_commands(ch)) return MR_CLOSED;
  amqp_basic_get_t get = {.queue = queue, .no_ack = no_ack};
  mr_call_entry entry = {.reply = AMQP_BASIC_GET_OK_METHOD, .no_ack = no_ack};
  return send_call(ch, AMQP_BASIC_GET_METHOD, &get, entry);
}

/* ---- what the broker sends ---- */

/* Answered at once; the broker may have crossed a close of ours, whose answer is then still to come
 * and keeps the number taken. */
static bool closed_by_broker(mr_channel *ch, amqp_bytes_t args, mr_event *event) {
  mr_engine *e = ch->engine;
  mr_reader r = mr_reader_of(args, true);
  mr_error *error = &event->error;
  *error = (mr_error){.kind = MR_KIND_CHANNEL, .code = mr_read16(&r)};
  mr_error_text(error, mr_read_shortstr(&r));
  if (!error->text[0])
    mr_error_text(error, amqp_cstring_bytes("the broker closed the channel without a reason"));
  error->class_id = mr_read16(&r);
  error->method_id = mr_read16(&r);
  amqp_channel_close_ok_t ok = {0};
  if (!mr_answer(e, ch->id, AMQP_CHANNEL_CLOSE_OK_METHOD, &ok)) return false;
  bool crossed = ch->state == MR_CH_CLOSING;
  bool tell = !ch->released;
  event->type = MR_EV_CHANNEL_CLOSED;
  event->channel = ch;
  if (!crossed) {
    mr_channel_end(ch);
    return tell;
  }
  ch->state = MR_CH_CLOSED;
  ch->calls.head = 0;
  ch->calls.tail = 1;
  ch->calls.items[0] = (mr_call_entry){.reply = AMQP_CHANNEL_CLOSE_OK_METHOD};
  return tell;
}

static bool cancelled_by_broker(mr_channel *ch, amqp_bytes_t args, mr_event *event) {
  mr_reader r = mr_reader_of(args, true);
  amqp_bytes_t tag = mr_read_shortstr(&r);
  bool nowait = mr_read8(&r) & 1;
  amqp_basic_cancel_ok_t ok = {.consumer_tag = tag};
  if (!nowait && !mr_answer(ch->engine, ch->id, AMQP_BASIC_CANCEL_OK_METHOD, &ok)) return false;
  const mr_consumer *consumer = mr_consumers_find(ch, tag);
  if (!consumer) return false; /* it crossed a cancel of ours */
  event->type = MR_EV_CONSUMER_CANCEL;
  event->channel = ch;
  event->consumer_tag = tag;
  event->consumer_ref = consumer->ref;
  mr_consumers_remove(ch, tag);
  return true;
}

static bool flow_by_broker(mr_channel *ch, amqp_bytes_t args, mr_event *event) {
  amqp_channel_flow_ok_t ok = {.active = *(const uint8_t *)args.bytes & 1};
  if (!mr_answer(ch->engine, ch->id, AMQP_CHANNEL_FLOW_OK_METHOD, &ok)) return false;
  ch->flow_off = !ok.active;
  event->type = MR_EV_FLOW;
  event->channel = ch;
  event->active = ok.active;
  return true;
}

/* basic.ack and basic.nack: what they name is reported by mr_engine_next, run by run. */
static void confirmed_by_broker(mr_channel *ch, amqp_method_number_t method, amqp_bytes_t args) {
  mr_engine *e = ch->engine;
  const uint8_t *p = args.bytes;
  const char *wrong = "a confirm on a channel without confirms";
  if (ch->confirm)
    wrong = mr_confirms_settle(&ch->confirms, mr_get64(p), p[8] & 1,
                               method == AMQP_BASIC_NACK_METHOD, &e->cursor);
  if (wrong)
    mr_protocol_error(e, AMQP_COMMAND_INVALID, "channel %u: %s", ch->id, wrong);
  else
    e->cursor_channel = ch;
}

static void note_reply(mr_channel *ch, amqp_method_number_t method, const void *decoded) {
  switch (method) {
    case AMQP_CHANNEL_OPEN_OK_METHOD:
      if (ch->state == MR_CH_OPENING) ch->state = MR_CH_OPEN;
      break;
    case AMQP_BASIC_CANCEL_OK_METHOD:
      mr_consumers_remove(ch, ((const amqp_basic_cancel_ok_t *)decoded)->consumer_tag);
      break;
    case AMQP_BASIC_RECOVER_OK_METHOD: ch->recovering--; break;
    case AMQP_TX_COMMIT_OK_METHOD: mr_acks_tx_done(&ch->acks, true); break;
    case AMQP_TX_ROLLBACK_OK_METHOD: mr_acks_tx_done(&ch->acks, false); break;
    default: break;
  }
}

static bool replied(mr_channel *ch, amqp_method_number_t method, amqp_bytes_t args,
                    mr_event *event) {
  mr_engine *e = ch->engine;
  mr_call_entry call;
  amqp_method_number_t answers =
      method == AMQP_BASIC_GET_EMPTY_METHOD ? AMQP_BASIC_GET_OK_METHOD : method;
  if (!mr_calls_take(&ch->calls, answers, &call)) {
    const char *name = amqp_method_name(method);
    mr_protocol_error(e, AMQP_COMMAND_INVALID, "channel %u: %s answers nothing that was asked",
                      ch->id, name ? name : "a method");
    return false;
  }
  void *decoded = mr_decode_method(e, &e->pool, method, args);
  if (!decoded) return false;
  e->pool_used = true;
  note_reply(ch, method, decoded);
  event->type = MR_EV_REPLY;
  event->channel = ch;
  event->method.id = method;
  event->method.decoded = decoded;
  bool tell = !call.silent && !ch->released && ch->state != MR_CH_CLOSED;
  if (method == AMQP_CHANNEL_CLOSE_OK_METHOD) mr_channel_end(ch);
  return tell;
}

bool mr_channel_method(mr_channel *ch, amqp_method_number_t method, amqp_bytes_t args,
                       mr_event *event) {
  if (ch->assembly.method) {
    mr_protocol_error(ch->engine, AMQP_UNEXPECTED_FRAME,
                      "channel %u: a method in the middle of a message", ch->id);
    return false;
  }
  if (method == AMQP_BASIC_DELIVER_METHOD || method == AMQP_BASIC_GET_OK_METHOD ||
      method == AMQP_BASIC_RETURN_METHOD) {
    mr_content_begin(ch, method, args);
    return false;
  }
  const char *wrong = mr_method_check(method, args);
  if (wrong) {
    mr_protocol_error(ch->engine, AMQP_SYNTAX_ERROR, "channel %u: method %u.%u: %s", ch->id,
                      method >> 16, method & 0xFFFF, wrong);
    return false;
  }
  switch (method) {
    case AMQP_BASIC_ACK_METHOD:
    case AMQP_BASIC_NACK_METHOD: confirmed_by_broker(ch, method, args); return false;
    case AMQP_CHANNEL_CLOSE_METHOD: return closed_by_broker(ch, args, event);
    case AMQP_CHANNEL_FLOW_METHOD: return flow_by_broker(ch, args, event);
    case AMQP_BASIC_CANCEL_METHOD: return cancelled_by_broker(ch, args, event);
    default: return replied(ch, method, args, event);
  }
}
