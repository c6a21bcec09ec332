/* The confirm window: which publishes of a channel the broker has settled. A ring of one byte a
 * publish, indexed by sequence number. */
#ifndef MR_CONFIRM_H
#define MR_CONFIRM_H

#include "core/moonrabbit.h"

typedef struct {
  uint8_t *slots;     /* mr_outcome each; owned; NULL while cap is 0 */
  uint64_t cap;       /* a power of two, or 0 */
  uint64_t base;      /* the oldest sequence number that may be unsettled */
  uint64_t next;      /* the number of the next publish; the first is 1 */
  uint64_t unsettled; /* how many of base..next-1 are */
  uint32_t window;    /* bound on next - base; 0: none */
} mr_confirms;

/* What is left to report of an ack or nack that named several publishes. */
typedef struct {
  uint64_t at;   /* the next to report */
  uint64_t last; /* at > last: nothing is left */
  bool nack;
} mr_confirm_cursor;

void mr_confirms_init(mr_confirms *c);
void mr_confirms_free(mr_confirms *c);

/* Whether one more publish may be counted; makes room for it. */
mr_status mr_confirms_admit(mr_confirms *c);
/* Counts one publish that mr_confirms_admit allowed; returns its number. */
uint64_t mr_confirms_add(mr_confirms *c);
/* Notes that a publish came back. False: no such publish is unsettled. */
bool mr_confirms_returned(mr_confirms *c, uint64_t seq);
/* Begins to settle what basic.ack or basic.nack names. NULL, or what is wrong with it. */
const char *mr_confirms_settle(const mr_confirms *c, uint64_t tag, bool multiple, bool nack,
                               mr_confirm_cursor *cursor);
/* Settles and reports the next run of one outcome; false: the cursor is at its end. */
bool mr_confirms_step(mr_confirms *c, mr_confirm_cursor *cursor, uint64_t *first, uint64_t *last,
                      mr_outcome *outcome);
mr_outcome mr_confirms_outcome(const mr_confirms *c, uint64_t seq);

#endif
