/* What a client asks of a broker on a channel, and what the engine must remember of it. */
#include "core/engine.h"

enum { NAMES_ROOM = 1024 }; /* what a method holds beside its arguments table, at most */

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
  if (!mr_takes_commands(ch)) return MR_CLOSED;
  mr_call_entry entry = {.reply = mr_method_reply(method)};
  mr_status status = method == AMQP_BASIC_CANCEL_METHOD
                         ? send_cancel(ch, *(const amqp_basic_cancel_t *)decoded)
                         : send_call(ch, method, decoded, entry);
  if (status == MR_OK) note_sent(ch, method, decoded);
  return status;
}

mr_status mr_consume(mr_channel *ch, const amqp_basic_consume_t *consume, uint32_t ref) {
  if (!mr_takes_commands(ch)) return MR_CLOSED;
  if (ref == 0) return MR_BAD_ARGUMENT;
  mr_status status = mr_consumers_add(ch, consume->consumer_tag, consume->no_ack, ref);
  if (status != MR_OK) return status;
  mr_call_entry entry = {.reply = AMQP_BASIC_CONSUME_OK_METHOD};
  status = send_call(ch, AMQP_BASIC_CONSUME_METHOD, (void *)(uintptr_t)consume, entry);
  if (status != MR_OK) mr_consumers_undo_add(ch);
  return status;
}

mr_status mr_get(mr_channel *ch, amqp_bytes_t queue, bool no_ack) {
  if (!mr_takes_commands(ch)) return MR_CLOSED;
  amqp_basic_get_t get = {.queue = queue, .no_ack = no_ack};
  mr_call_entry entry = {.reply = AMQP_BASIC_GET_OK_METHOD, .no_ack = no_ack};
  return send_call(ch, AMQP_BASIC_GET_METHOD, &get, entry);
}
