/* Frames off the receive buffer, and the events that they make. */
#include "core/engine.h"

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
  /* Sent before the broker had our answer to its close. Another answer would be the first method of a new
   * channel to it, which ends the connection. */
  if (!ch && mr_is_retired(e, f->channel) && f->type != AMQP_FRAME_HEARTBEAT) return false;
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
