/* The engine: bytes in, events out, bytes out, time. */
#include "core/engine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum {
  RX_FIRST = 4096,     /* an idle connection should cost little */
  RX_LARGEST = 131072, /* a busy one should read much at once */
  TX_KEEP = 262144,    /* a larger output buffer is given back once it is empty */
  METHOD_ROOM = 512,   /* most methods fit; a larger one is encoded a second time */
  MOST_ANSWERS = 1 << 20,
  IDLE_AFTER = 1 /* seconds without a byte after which a large receive buffer is given back */
};

/* ---- errors and ends ---- */

void mr_error_text(mr_error *error, amqp_bytes_t text) {
  size_t n = text.len < sizeof error->text - 1 ? text.len : sizeof error->text - 1;
  for (size_t i = 0; i < n; i++) {
    unsigned char c = ((const unsigned char *)text.bytes)[i];
    error->text[i] = (char)(c < 0x20 || c == 0x7F ? '?' : c);
  }
  error->text[n] = '\0';
}

static void end_with(mr_engine *e, mr_kind kind, uint16_t code, const char *format, va_list args) {
  if (e->state == MR_ENDED) return;
  char text[sizeof e->error.text];
  vsnprintf(text, sizeof text, format, args);
  e->state = MR_ENDED;
  e->error = (mr_error){.kind = kind, .code = code};
  mr_error_text(&e->error, amqp_cstring_bytes(text));
}

void mr_end(mr_engine *e, mr_kind kind, uint16_t code, const char *format, ...) {
  va_list args;
  va_start(args, format);
  end_with(e, kind, code, format, args);
  va_end(args);
}

void mr_protocol_error(mr_engine *e, uint16_t code, const char *format, ...) {
  bool tell = e->state == MR_OPEN || e->state == MR_CLOSING;
  va_list args;
  va_start(args, format);
  end_with(e, MR_KIND_PROTOCOL, code, format, args);
  va_end(args);
  if (!tell) return;
  amqp_connection_close_t close = {.reply_code = code,
                                   .reply_text = amqp_cstring_bytes(e->error.text)};
  if (close.reply_text.len > MR_SHORTSTR_MAX) close.reply_text.len = MR_SHORTSTR_MAX;
  mr_send_method(e, 0, AMQP_CONNECTION_CLOSE_METHOD, &close); /* best effort */
}

const char *mr_status_text(mr_status status) {
  switch (status) {
    case MR_OK:
    case MR_FLUSH: return "done";
    case MR_NO_MEMORY: return "out of memory";
    case MR_CLOSED: return "the channel or connection is closed";
    case MR_BLOCKED: return "the broker has blocked publishing";
    case MR_WINDOW_FULL: return "the window of unconfirmed publishes is full";
    case MR_OVERFLOW: return "the output buffer is full";
    case MR_TOO_LARGE: return "the message is too large";
    case MR_BAD_ARGUMENT: return "an argument that cannot be encoded";
    case MR_NO_CHANNELS: return "every channel that the broker allows is open";
    case MR_SETTLED: return "the delivery was settled before";
    case MR_UNKNOWN_TAG: return "no such delivery is outstanding";
  }
  return "an unknown status";
}

void mr_detach_channels(mr_engine *e) {
  for (size_t id = 0; id < e->cap_channels; id++)
    if (e->channels[id]) mr_channel_end(e->channels[id]);
}

/* ---- methods ---- */

static long encode_method(mr_engine *e, uint16_t channel, amqp_method_number_t method,
                          void *decoded, size_t room) {
  uint8_t *p = mr_buffer_reserve(&e->tx, room + MR_FRAME_OVERHEAD + 4);
  if (!p) return MR_NO_MEMORY;
  int n = amqp_encode_method(method, decoded, mr_bytes(p + MR_FRAME_HEADER + 4, room));
  if (n < 0) return MR_TOO_LARGE;
  mr_put32(mr_put_frame_header(p, AMQP_FRAME_METHOD, channel, (uint32_t)n + 4), method);
  mr_put8(p + MR_FRAME_HEADER + 4 + n, MR_FRAME_END);
  return n;
}

mr_status mr_send_method(mr_engine *e, uint16_t channel, amqp_method_number_t method,
                         void *decoded) {
  long n = encode_method(e, channel, method, decoded, METHOD_ROOM);
  if (n == MR_TOO_LARGE)
    n = encode_method(e, channel, method, decoded, e->tuned.frame_max - MR_FRAME_OVERHEAD - 4);
  if (n < 0) return (mr_status)n;
  e->tx.tail += (size_t)n + 4 + MR_FRAME_OVERHEAD;
  return MR_OK;
}

bool mr_answer(mr_engine *e, uint16_t channel, amqp_method_number_t method, void *decoded) {
  size_t before = mr_buffer_size(&e->tx);
  if (mr_send_method(e, channel, method, decoded) != MR_OK) {
    mr_end(e, MR_KIND_MEMORY, 0, "out of memory for an answer");
    return false;
  }
  e->answers += mr_buffer_size(&e->tx) - before;
  if (e->answers <= MOST_ANSWERS) return true;
  mr_end(e, MR_KIND_PROTOCOL, 0, "the broker reads no answers to what it asks");
  return false;
}

void *mr_decode_method(mr_engine *e, amqp_pool_t *pool, amqp_method_number_t method,
                       amqp_bytes_t args) {
  void *decoded = NULL;
  int n = amqp_decode_method(method, pool, args, &decoded);
  if (n >= 0) return decoded;
  if (n == AMQP_STATUS_NO_MEMORY)
    mr_end(e, MR_KIND_MEMORY, 0, "out of memory for a method");
  else
    mr_protocol_error(e, AMQP_SYNTAX_ERROR, "method %u.%u cannot be decoded", method >> 16,
                      method & 0xFFFF);
  return NULL;
}

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
  if (e->tx.cap > TX_KEEP) mr_buffer_free(&e->tx);
}

size_t mr_engine_tx_pending(const mr_engine *e) { return mr_buffer_size(&e->tx); }

/* ---- time ---- */

static bool beats(const mr_engine *e) {
  return e->tuned.heartbeat && (e->state == MR_OPEN || e->state == MR_CLOSING);
}

static double silence_deadline(const mr_engine *e) { return e->last_rx + 2.0 * e->tuned.heartbeat; }

static double sooner(double a, double b) { return a < 0 || (b >= 0 && b < a) ? b : a; }

double mr_engine_deadline(mr_engine *e, double now) {
  double deadline = -1;
  if (e->state == MR_ENDED) return deadline;
  if (beats(e)) {
    deadline = e->next_heartbeat;
    if (!e->paused) deadline = sooner(deadline, silence_deadline(e));
  }
  if (e->gathered && e->ack_deadline < 0) e->ack_deadline = now + e->ack_delay;
  return e->gathered ? sooner(deadline, e->ack_deadline) : deadline;
}

static void send_heartbeat(mr_engine *e, double now) {
  e->next_heartbeat = now + e->tuned.heartbeat / 2.0;
  if (mr_buffer_size(&e->tx)) return; /* what waits to leave is a sign of life already */
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
  if (now - e->last_tick > half * 1.5) {
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
  if (!paused) e->last_rx = now;
}

/* ---- frames ---- */

typedef struct {
  uint8_t type;
  uint16_t channel;
  amqp_bytes_t payload;
} frame;

static bool is_frame_type(uint8_t type) {
  return type == AMQP_FRAME_METHOD || type == AMQP_FRAME_HEADER || type == AMQP_FRAME_BODY ||
         type == AMQP_FRAME_HEARTBEAT;
}

static size_t largest_frame(const mr_engine *e) {
  return e->state >= MR_WAIT_OPEN ? e->tuned.frame_max : MR_DEFAULT_FRAME_MAX;
}

/* Takes the next whole frame off the receive buffer; false: there is none, or it is none. */
static bool take_frame(mr_engine *e, frame *f) {
  if (e->state == MR_WAIT_START && !mr_greeting_ok(e)) return false;
  size_t have = mr_buffer_size(&e->rx);
  if (have < MR_FRAME_HEADER) return false;
  const uint8_t *p = e->rx.data + e->rx.head;
  size_t size = mr_get32(p + 3);
  if (!is_frame_type(p[0])) {
    mr_protocol_error(e, AMQP_FRAME_ERROR, "a frame of unknown type 0x%02x", p[0]);
    return false;
  }
  if (size > largest_frame(e) - MR_FRAME_OVERHEAD) {
    mr_protocol_error(e, AMQP_FRAME_ERROR, "a frame of %zu bytes, over frame_max of %zu",
                      size + MR_FRAME_OVERHEAD, largest_frame(e));
    return false;
  }
  e->rx_need = size + MR_FRAME_OVERHEAD;
  if (have < e->rx_need) return false;
  e->rx_need = 0;
  if (p[MR_FRAME_HEADER + size] != MR_FRAME_END) {
    mr_protocol_error(e, AMQP_FRAME_ERROR, "a frame that does not end in 0xCE but in 0x%02x",
                      p[MR_FRAME_HEADER + size]);
    return false;
  }
  *f = (frame){p[0], mr_get16(p + 1), mr_bytes(p + MR_FRAME_HEADER, size)};
  mr_buffer_consume(&e->rx, size + MR_FRAME_OVERHEAD);
  return true;
}

static bool method_frame(mr_engine *e, mr_channel *ch, const frame *f, mr_event *event) {
  if (f->payload.len < 4) {
    mr_protocol_error(e, AMQP_FRAME_ERROR, "a method frame of %zu bytes", f->payload.len);
    return false;
  }
  amqp_method_number_t method = mr_get32(f->payload.bytes);
  amqp_bytes_t args = mr_bytes((const uint8_t *)f->payload.bytes + 4, f->payload.len - 4);
  if (f->channel == 0) return mr_connection_method(e, method, args, event);
  if (ch) return mr_channel_method(ch, method, args, event);
  mr_protocol_error(e, AMQP_CHANNEL_ERROR, "a method on channel %u, which is not open", f->channel);
  return false;
}

static bool on_frame(mr_engine *e, const frame *f, mr_event *event) {
  mr_channel *ch = f->channel ? mr_find_channel(e, f->channel) : NULL;
  switch (f->type) {
    case AMQP_FRAME_METHOD: return method_frame(e, ch, f, event);
    case AMQP_FRAME_HEARTBEAT:
      if (f->channel == 0 && f->payload.len == 0) return false;
      mr_protocol_error(e, AMQP_FRAME_ERROR, "a malformed heartbeat");
      return false;
    default: break;
  }
  if (ch)
    return f->type == AMQP_FRAME_HEADER ? mr_content_header(ch, f->payload, event)
                                        : mr_content_body(ch, f->payload, event);
  mr_protocol_error(e, AMQP_CHANNEL_ERROR, "content on channel %u, which is not open", f->channel);
  return false;
}

/* ---- events ---- */

/* Forgets what the last event showed. */
static void release_last(mr_engine *e) {
  if (e->delivering) mr_content_reset(e->delivering);
  e->delivering = NULL;
  if (e->pool_used) empty_amqp_pool(&e->pool);
  e->pool_used = false;
}

static bool next_confirm(mr_engine *e, mr_event *event) {
  mr_channel *ch = e->cursor_channel;
  if (!ch) return false;
  event->type = MR_EV_CONFIRM;
  event->channel = ch;
  if (mr_confirms_step(&ch->confirms, &e->cursor, &event->confirm.first, &event->confirm.last,
                       &event->confirm.outcome))
    return true;
  e->cursor_channel = NULL;
  return false;
}

static void end_at_eof(mr_engine *e) {
  const char *when = mr_buffer_size(&e->rx) ? " in the middle of a frame" : "";
  if (e->state == MR_WAIT_TUNE && !e->close_reports_auth)
    mr_end(e, MR_KIND_AUTH, 0, "%s after the credentials were sent: it does not accept them",
           e->eof_text);
  else if (e->state < MR_OPEN)
    mr_end(e, MR_KIND_CLOSED, 0, "%s%s during the handshake", e->eof_text, when);
  else
    mr_end(e, MR_KIND_CLOSED, 0, "%s%s", e->eof_text, when);
}

static bool next_event(mr_engine *e, mr_event *event) {
  frame f;
  for (;;) {
    event->channel = NULL;
    if (next_confirm(e, event)) return true;
    event->channel = NULL;
    if (e->state == MR_ENDED) return false;
    if (take_frame(e, &f)) {
      if (on_frame(e, &f, event)) return true;
    } else if (e->state != MR_ENDED) {
      if (!e->eof) return false;
      end_at_eof(e);
    }
  }
}

static bool report_end(mr_engine *e, mr_event *event) {
  if (e->state != MR_ENDED || e->ended_reported) return false;
  e->ended_reported = true;
  mr_detach_channels(e);
  event->type = MR_EV_CLOSED;
  event->error = e->error;
  return true;
}

mr_event_type mr_engine_next(mr_engine *e, mr_event *event) {
  release_last(e);
  while (next_event(e, event)) {
    if (!event->channel || !event->channel->released) return event->type;
    release_last(e);
  }
  event->channel = NULL;
  if (!report_end(e, event)) event->type = MR_EV_NONE;
  return event->type;
}

/* ---- the connection ---- */

bool mr_engine_is_open(const mr_engine *e) { return e->state == MR_OPEN; }
bool mr_engine_is_blocked(const mr_engine *e) { return e->blocked; }
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
