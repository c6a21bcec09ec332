/* Settling deliveries: gathered acks, nacks, rejects, and when they are written. */
#include "core/engine.h"

enum { GATHER_WITHOUT_PREFETCH = 64 };

static void add_gathered(mr_channel *ch) {
  if (ch->is_gathered) return;
  ch->is_gathered = true;
  ch->next_gathered = ch->engine->gathered;
  ch->engine->gathered = ch;
}

void mr_forget_gathered(mr_channel *ch) {
  if (!ch->is_gathered) return;
  mr_channel **link = &ch->engine->gathered;
  while (*link != ch) link = &(*link)->next_gathered;
  *link = ch->next_gathered;
  ch->is_gathered = false;
  if (!ch->engine->gathered) ch->engine->ack_deadline = -1;
}

static amqp_method_number_t method_of(mr_settle_kind kind) {
  switch (kind) {
    case MR_SETTLE_NACK: return AMQP_BASIC_NACK_METHOD;
    case MR_SETTLE_REJECT: return AMQP_BASIC_REJECT_METHOD;
    default: return AMQP_BASIC_ACK_METHOD;
  }
}

static uint8_t bits_of(const mr_settlement *s) {
  if (s->kind == MR_SETTLE_REJECT) return s->requeue;
  return (uint8_t)(s->multiple | (s->kind == MR_SETTLE_NACK && s->requeue) << 1);
}

/* Room for the frame was reserved by the caller: a settlement that is counted must leave. */
static void write_settlement(mr_channel *ch, const mr_settlement *s) {
  mr_buffer *tx = &ch->engine->tx;
  uint8_t *p = tx->data + tx->tail;
  p = mr_put_frame_header(p, AMQP_FRAME_METHOD, ch->id, 4 + 9);
  p = mr_put32(p, method_of(s->kind));
  p = mr_put64(p, s->tag);
  p = mr_put8(p, bits_of(s));
  mr_put8(p, MR_FRAME_END);
  tx->tail += MR_SETTLEMENT_FRAME;
}

static bool reserve_frame(mr_channel *ch) {
  return mr_buffer_reserve(&ch->engine->tx, MR_SETTLEMENT_FRAME) != NULL;
}

mr_status mr_flush_acks(mr_channel *ch) {
  if (!ch->engine) return MR_CLOSED;
  mr_settlement s;
  while (ch->acks.gathered) {
    if (!reserve_frame(ch)) return MR_NO_MEMORY;
    if (mr_acks_next(&ch->acks, &s)) write_settlement(ch, &s);
  }
  mr_forget_gathered(ch);
  return MR_OK;
}

mr_status mr_flush_all_acks(mr_engine *e) {
  while (e->gathered) {
    mr_status status = mr_flush_acks(e->gathered);
    if (status != MR_OK) return status;
  }
  return MR_OK;
}

static mr_status gathered_more(mr_channel *ch) {
  add_gathered(ch);
  size_t most = ch->prefetch ? ch->prefetch / 4u : GATHER_WITHOUT_PREFETCH;
  if (ch->acks.gathered < most) return MR_OK;
  mr_status status = mr_flush_acks(ch);
  /* Without memory the acks stay gathered, and the next try writes them. */
  return status == MR_OK ? MR_FLUSH : MR_OK;
}

static bool can_settle(const mr_channel *ch) {
  return ch->engine && ch->engine->state == MR_OPEN && ch->state == MR_CH_OPEN;
}

mr_status mr_settle(mr_channel *ch, uint64_t tag, mr_settle_kind kind, bool requeue) {
  if (!can_settle(ch)) return MR_CLOSED;
  bool at_once = kind != MR_SETTLE_ACK || ch->acks.tx;
  if (at_once && !reserve_frame(ch)) return MR_NO_MEMORY;
  mr_settlement s;
  mr_status status = mr_acks_settle(&ch->acks, tag, kind, requeue, &s);
  if (status == MR_OK) return gathered_more(ch);
  if (status != MR_FLUSH) return status;
  write_settlement(ch, &s);
  return MR_OK;
}

mr_status mr_outstanding(const mr_channel *ch, uint64_t tag) {
  return can_settle(ch) ? mr_acks_look(&ch->acks, tag) : MR_CLOSED;
}

mr_status mr_settle_upto(mr_channel *ch, uint64_t tag, mr_settle_kind kind, bool requeue) {
  if (!can_settle(ch)) return MR_CLOSED;
  if (kind == MR_SETTLE_REJECT) return MR_BAD_ARGUMENT;
  if (tag > ch->acks.last_tag) return MR_UNKNOWN_TAG;
  uint64_t last = mr_acks_last_outstanding(&ch->acks, tag);
  if (!last) return tag ? MR_SETTLED : MR_OK;
  if (kind == MR_SETTLE_ACK && !ch->acks.tx) {
    mr_acks_gather_upto(&ch->acks, last);
    return gathered_more(ch);
  }
  /* A nack with `multiple` would take back what is acked but not written yet. */
  mr_status status = mr_flush_acks(ch);
  if (status != MR_OK) return status;
  if (!reserve_frame(ch)) return MR_NO_MEMORY;
  mr_acks_settle_upto(&ch->acks, last);
  mr_settlement s = {.tag = last, .kind = kind, .multiple = true, .requeue = requeue};
  write_settlement(ch, &s);
  return MR_OK;
}

size_t mr_unsettled(const mr_channel *ch) { return can_settle(ch) ? ch->acks.outstanding : 0; }
