/* The ack window: the deliveries of a channel that are not settled yet, and the acks gathered. */
#ifndef MR_ACK_H
#define MR_ACK_H

#include "core/buffer.h"
#include "core/moonrabbit.h"

typedef struct {
  uint64_t tag;
  uint8_t state;
} mr_delivery;

typedef struct {
  mr_delivery *items; /* in the order of their tags; owned */
  size_t cap, head, tail;
  size_t outstanding; /* neither settled nor gathered */
  size_t gathered;    /* acked by the user, not written yet */
  size_t hint;        /* while gathered acks are taken: none is left before this place */
  uint64_t last_tag;  /* the highest of the channel */
  uint64_t last_held; /* the newest that was to be settled */
  uint64_t recovered; /* deliveries up to this were given back by basic.recover */
  bool tx;            /* acks are part of a transaction: written at once, restored by a rollback */
} mr_acks;

/* One basic.ack, nack or reject to be written. */
typedef struct {
  uint64_t tag;
  mr_settle_kind kind;
  bool multiple;
  bool requeue;
} mr_settlement;

enum { MR_SETTLEMENT_FRAME = 7 + 4 + 9 + 1 };

void mr_acks_free(mr_acks *a);
/* A delivery came. MR_BAD_ARGUMENT: its tag does not grow; MR_NO_MEMORY. RabbitMQ gives all answers of
 * direct reply-to, which nobody settles, the tag that the next delivery will have. */
mr_status mr_acks_add(mr_acks *a, uint64_t tag, bool no_ack);
/* Settles one delivery: gathers an ack, or fills *out and answers MR_FLUSH when a frame must be
 * written now. MR_SETTLED or MR_UNKNOWN_TAG: nothing to settle. */
mr_status mr_acks_settle(mr_acks *a, uint64_t tag, mr_settle_kind kind, bool requeue,
                         mr_settlement *out);
/* Whether a delivery is outstanding: MR_OK, or what mr_acks_settle would answer. */
mr_status mr_acks_look(const mr_acks *a, uint64_t tag);
/* The last outstanding delivery up to `tag` (0: of all); 0: there is none. */
uint64_t mr_acks_last_outstanding(const mr_acks *a, uint64_t tag);
/* Marks every outstanding delivery up to `tag` as settled by the frame that the caller writes. */
void mr_acks_settle_upto(mr_acks *a, uint64_t tag);
/* Gathers an ack for every outstanding delivery up to `tag`. */
void mr_acks_gather_upto(mr_acks *a, uint64_t tag);
/* Takes the next ack to write out of what is gathered; false: nothing is left. */
bool mr_acks_next(mr_acks *a, mr_settlement *out);
/* basic.recover: the broker takes everything back. */
void mr_acks_clear(mr_acks *a);
/* A commit or rollback is sent. */
void mr_acks_tx_end(mr_acks *a, bool commit);

#endif
