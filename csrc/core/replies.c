/* What a broker sends on a channel: answers, confirms, and closes, cancels and flow of its own. */
#include "core/engine.h"

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
  ch->ended_by_broker = true;
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
      mr_consumers_cancelled(ch, ((const amqp_basic_cancel_ok_t *)decoded)->consumer_tag);
      break;
    case AMQP_BASIC_RECOVER_OK_METHOD: ch->recovering--; break;
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
  /* Its end was told; only the answer to our own close is still due. */
  if (ch->state == MR_CH_CLOSED && method != AMQP_CHANNEL_CLOSE_OK_METHOD) return false;
  switch (method) {
    case AMQP_BASIC_ACK_METHOD:
    case AMQP_BASIC_NACK_METHOD: confirmed_by_broker(ch, method, args); return false;
    case AMQP_CHANNEL_CLOSE_METHOD: return closed_by_broker(ch, args, event);
    case AMQP_CHANNEL_FLOW_METHOD: return flow_by_broker(ch, args, event);
    case AMQP_BASIC_CANCEL_METHOD: return cancelled_by_broker(ch, args, event);
    default: return replied(ch, method, args, event);
  }
}
