/* How a connection ends, and what is said about it. */
#include <stdarg.h>
#include <stdio.h>

#include "core/engine.h"

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
