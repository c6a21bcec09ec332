/* The engine as its driver sees it: bytes in, bytes out, time. Events are in frames.c. */
#include <stdio.h>

#include "core/engine.h"

enum {
  RX_FIRST = 4096,     /* an idle connection should cost little */
  RX_LARGEST = 262144, /* a busy one should read much at once */
  IDLE_AFTER = 1       /* seconds without a byte after which a large receive buffer is given back */
};

/* ---- bytes in ---- */

mr_status mr_engine_start(mr_engine *e, double now) {
  static const uint8_t HEADER[8] = {'A', 'M', 'Q', 'P', 0, 0, 9, 1};
  if (e->state != MR_IDLE) return MR_CLOSED;
  uint8_t *p = mr_buffer_reserve(&e->tx, sizeof HEADER);
  if (!p) return MR_NO_MEMORY;
  mr_put_bytes(p, HEADER, sizeof HEADER);
  e->tx.tail += sizeof HEADER;
  e->state = MR_WAIT_START;
  e->last_rx = e->last_tick = now;
  e->rx_target = RX_FIRST;
  return MR_OK;
}

uint8_t *mr_engine_rx_reserve(mr_engine *e, size_t *space) {
  *space = 0;
  mr_buffer *rx = &e->rx;
  size_t held = mr_buffer_size(rx);
  size_t want = e->rx_need > e->rx_target ? e->rx_need : e->rx_target;
  if (e->state == MR_ENDED || e->eof || held >= want) return NULL;
  if (rx->cap - rx->tail < want - held) mr_buffer_compact(rx);
  uint8_t *place = mr_buffer_reserve(rx, want - held);
  if (!place) {
    mr_end(e, MR_KIND_MEMORY, 0, "out of memory for received bytes");
    return NULL;
  }
  *space = e->rx_space = rx->cap - rx->tail;
  return place;
}

void mr_engine_rx_commit(mr_engine *e, size_t n, double now) {
  e->rx.tail += n;
  e->last_rx = now;
  e->reprieved = false;
  if (n == e->rx_space && e->rx_target < RX_LARGEST) e->rx_target *= 2;
}

size_t mr_engine_feed(mr_engine *e, const void *bytes, size_t n, double now) {
  size_t taken = 0;
  while (taken < n) {
    size_t space;
    uint8_t *place = mr_engine_rx_reserve(e, &space);
    if (!place) break;
    size_t some = n - taken < space ? n - taken : space;
    memcpy(place, (const uint8_t *)bytes + taken, some);
    mr_engine_rx_commit(e, some, now);
    taken += some;
  }
  return taken;
}

void mr_engine_eof(mr_engine *e, const char *text) {
  e->eof = true;
  snprintf(e->eof_text, sizeof e->eof_text, "%s", text ? text : "the peer closed the connection");
}

/* ---- bytes out ---- */

static bool beats(const mr_engine *e) {
  return e->tuned.heartbeat && (e->state == MR_OPEN || e->state == MR_CLOSING);
}

const uint8_t *mr_engine_tx_peek(mr_engine *e, size_t *len) {
  *len = 0;
  if (mr_buffer_size(&e->tx) == 0) return NULL;
  if (e->gathered && e->state != MR_ENDED) mr_flush_all_acks(e);
  *len = mr_buffer_size(&e->tx);
  return e->tx.data + e->tx.head;
}

void mr_engine_tx_consume(mr_engine *e, size_t n, double now) {
  mr_buffer_consume(&e->tx, n);
  e->next_heartbeat = now + e->tuned.heartbeat / 2.0;
  if (mr_buffer_size(&e->tx)) return;
  e->answers = 0;
  /* With heartbeats a large one goes when nothing was sent for as long as a heartbeat: one who sends much
   * will send more, and would have it grow anew each time. */
  if (e->tx.cap > MR_TX_KEEP && !beats(e)) mr_buffer_free(&e->tx);
}

size_t mr_engine_tx_pending(const mr_engine *e) { return mr_buffer_size(&e->tx); }

/* ---- time ---- */

static double silence_deadline(const mr_engine *e) { return e->last_rx + 2.0 * e->tuned.heartbeat; }

static double sooner(double a, double b) { return a < 0 || (b >= 0 && b < a) ? b : a; }

double mr_engine_silence_deadline(const mr_engine *e) {
  return beats(e) && !e->paused ? silence_deadline(e) : -1;
}

double mr_engine_deadline(mr_engine *e, double now) {
  double deadline = -1;
  if (e->state == MR_ENDED) return deadline;
  if (beats(e)) deadline = sooner(e->next_heartbeat, mr_engine_silence_deadline(e));
  if (e->gathered && e->ack_deadline < 0) e->ack_deadline = now + e->ack_delay;
  return e->gathered ? sooner(deadline, e->ack_deadline) : deadline;
}

static void send_heartbeat(mr_engine *e, double now) {
  e->next_heartbeat = now + e->tuned.heartbeat / 2.0;
  if (mr_buffer_size(&e->tx)) return; /* what waits to leave is a sign of life already */
  mr_buffer_free(&e->tx);
  uint8_t *p = mr_buffer_reserve(&e->tx, MR_FRAME_OVERHEAD);
  if (!p) return;
  mr_put8(mr_put_frame_header(p, AMQP_FRAME_HEARTBEAT, 0, 0), MR_FRAME_END);
  e->tx.tail += MR_FRAME_OVERHEAD;
}

/* A process that was stalled itself has heard nothing either: its peer gets half an interval more,
 * in which what waits in the socket can be read. */
static void check_silence(mr_engine *e, double now) {
  double half = e->tuned.heartbeat / 2.0;
  if (now < silence_deadline(e)) return;
  if (!e->reprieved && now - e->last_tick > half * 1.5) {
    e->reprieved = true;
    e->last_rx = now - 3 * half;
    return;
  }
  mr_end(e, MR_KIND_TIMEOUT, 0, "no frame from the broker for %.0f s, two heartbeat intervals",
         now - e->last_rx);
}

static void give_back_memory(mr_engine *e, double now) {
  if (e->rx.cap <= 4 * RX_FIRST || mr_buffer_size(&e->rx) || now - e->last_rx < IDLE_AFTER) return;
  mr_buffer_free(&e->rx);
  e->rx_target = RX_FIRST;
}

void mr_engine_tick(mr_engine *e, double now) {
  if (e->state == MR_ENDED) return;
  if (e->gathered && e->ack_deadline >= 0 && now >= e->ack_deadline) mr_flush_all_acks(e);
  if (beats(e)) {
    if (!e->paused) check_silence(e, now);
    if (now >= e->next_heartbeat) send_heartbeat(e, now);
  }
  give_back_memory(e, now);
  e->last_tick = now;
}

void mr_engine_pause(mr_engine *e, bool paused, double now) {
  e->paused = paused;
  if (paused) return;
  e->last_rx = now;
  e->reprieved = false;
}

/* ---- the connection ---- */

bool mr_engine_is_open(const mr_engine *e) { return e->state == MR_OPEN; }
bool mr_engine_is_blocked(const mr_engine *e) { return (e->blocked & MR_BY_BROKER) != 0; }

void mr_engine_hold(mr_engine *e, bool held) {
  if (held)
    e->blocked |= MR_BY_CLIENT;
  else
    e->blocked &= (uint8_t)~MR_BY_CLIENT;
}
const amqp_table_t *mr_engine_server_properties(const mr_engine *e) {
  return &e->server_properties;
}
mr_tuned mr_engine_tuned(const mr_engine *e) { return e->tuned; }

mr_status mr_engine_close(mr_engine *e, uint16_t code, const char *text) {
  if (e->state == MR_ENDED) return MR_CLOSED;
  if (e->state == MR_CLOSING) return MR_OK;
  if (e->state != MR_OPEN) {
    mr_end(e, MR_KIND_CLOSED, 0, "closed during the handshake");
    return MR_OK;
  }
  mr_status status = mr_flush_all_acks(e);
  if (status != MR_OK) return status;
  amqp_connection_close_t close = {.reply_code = code, .reply_text = amqp_cstring_bytes(text)};
  if (close.reply_text.len > MR_SHORTSTR_MAX) close.reply_text.len = MR_SHORTSTR_MAX;
  status = mr_send_method(e, 0, AMQP_CONNECTION_CLOSE_METHOD, &close);
  if (status == MR_OK) e->state = MR_CLOSING;
  return status;
}
