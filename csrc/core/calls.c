/* Calls that wait for their answers, oldest first: AMQP answers the calls of a channel in order. */
#include <stdlib.h>
#include <string.h>

#include "core/engine.h"

enum { FIRST_CAP = 4 };

mr_status mr_calls_reserve(mr_calls *calls) {
  if (calls->tail < calls->cap) return MR_OK;
  if (calls->head > calls->cap / 2) {
    memmove(calls->items, calls->items + calls->head,
            (calls->tail - calls->head) * sizeof *calls->items);
    calls->tail -= calls->head;
    calls->head = 0;
    return MR_OK;
  }
  size_t cap = calls->cap ? calls->cap * 2 : FIRST_CAP;
  mr_call_entry *items = realloc(calls->items, cap * sizeof *items);
  if (!items) return MR_NO_MEMORY;
  calls->items = items;
  calls->cap = cap;
  return MR_OK;
}

void mr_calls_push(mr_calls *calls, mr_call_entry entry) { calls->items[calls->tail++] = entry; }

/* RabbitMQ's queue process sends these two itself, so they may come before or after the answers to
 * their neighbours (or, behind a channel.close, never). Everything else keeps its order. */
static bool sent_by_queue(amqp_method_number_t reply) {
  return reply == AMQP_BASIC_CONSUME_OK_METHOD || reply == AMQP_BASIC_CANCEL_OK_METHOD;
}

static bool may_pass(amqp_method_number_t reply, amqp_method_number_t waiting) {
  return sent_by_queue(reply) || sent_by_queue(waiting);
}

bool mr_calls_take(mr_calls *calls, amqp_method_number_t reply, mr_call_entry *entry) {
  size_t at = calls->head;
  while (at < calls->tail && calls->items[at].reply != reply) {
    if (!may_pass(reply, calls->items[at].reply)) return false;
    at++;
  }
  if (at == calls->tail) return false;
  *entry = calls->items[at];
  for (; at > calls->head; at--) calls->items[at] = calls->items[at - 1];
  calls->head++;
  if (calls->head == calls->tail) calls->head = calls->tail = 0;
  return true;
}

void mr_calls_free(mr_calls *calls) {
  free(calls->items);
  *calls = (mr_calls){0};
}
