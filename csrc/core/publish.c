/* Publishing: one basic.publish, its header and its body, written straight into the output. */
#include <stdlib.h>
#include <string.h>

#include "core/engine.h"

enum {
  SEQ_NAME = sizeof MR_SEQ_HEADER - 1,
  SEQ_ENTRY = 1 + SEQ_NAME + 1 + 8,
  STAMP = 12, /* hexadecimal digits of mr_route_stamp */
  MANDATORY_BIT = 1
};

static const uint8_t NO_PROPS[2] = {0, 0};

/* ---- encoding ---- */

static size_t method_frame_size(const mr_publish_args *args) {
  return MR_FRAME_OVERHEAD + 4 + 2 + 1 + args->exchange.len + 1 + args->routing_key.len + 1;
}

static uint8_t *put_method_frame(uint8_t *p, uint16_t channel, const mr_publish_args *args) {
  p = mr_put_frame_header(p, AMQP_FRAME_METHOD, channel,
                          (uint32_t)method_frame_size(args) - MR_FRAME_OVERHEAD);
  p = mr_put16(mr_put32(p, AMQP_BASIC_PUBLISH_METHOD), 0);
  p = mr_put_shortstr(p, args->exchange);
  p = mr_put_shortstr(p, args->routing_key);
  p = mr_put8(p, args->mandatory ? MANDATORY_BIT : 0);
  return mr_put8(p, MR_FRAME_END);
}

/* How properties grow when the sequence header joins them. */
static size_t seq_growth(const mr_props_layout *at) {
  return SEQ_ENTRY + (at->headers_len ? 0 : 4);
}

static uint8_t *put_seq(uint8_t *p, uint64_t seq) {
  p = mr_put_bytes(mr_put8(p, SEQ_NAME), MR_SEQ_HEADER, SEQ_NAME);
  return mr_put64(mr_put8(p, AMQP_FIELD_KIND_I64), seq);
}

/* Properties with the sequence header at the end of their headers; *seq_at is set to the place of
 * its number. */
static uint8_t *put_props_seq(uint8_t *p, amqp_bytes_t props, const mr_props_layout *at,
                              uint64_t seq, uint8_t **seq_at) {
  const uint8_t *from = props.bytes;
  uint8_t *start = p;
  size_t old = at->headers_len ? at->headers_len - 4 : 0;
  p = mr_put_bytes(p, from, at->headers);
  mr_put16(start, at->flags | MR_FLAG_HEADERS);
  p = mr_put32(p, (uint32_t)(old + SEQ_ENTRY));
  if (old) p = mr_put_bytes(p, from + at->headers + 4, old);
  p = put_seq(p, seq);
  *seq_at = p - 8;
  size_t rest = at->headers + at->headers_len;
  return mr_put_bytes(p, from + rest, props.len - rest);
}

static uint8_t *put_content_header(uint8_t *p, uint16_t channel, size_t props_len, uint64_t body) {
  p = mr_put_frame_header(p, AMQP_FRAME_HEADER, channel, (uint32_t)(MR_CONTENT_HEADER + props_len));
  p = mr_put16(mr_put16(p, AMQP_BASIC_CLASS), 0);
  return mr_put64(p, body);
}

static size_t body_frames_size(const mr_engine *e, size_t len) {
  size_t most = e->tuned.frame_max - MR_FRAME_OVERHEAD;
  return len + (len + most - 1) / most * MR_FRAME_OVERHEAD;
}

static uint8_t *put_body(const mr_engine *e, uint8_t *p, uint16_t channel, amqp_bytes_t body) {
  size_t most = e->tuned.frame_max - MR_FRAME_OVERHEAD;
  const uint8_t *from = body.bytes;
  for (size_t left = body.len; left;) {
    size_t n = left < most ? left : most;
    p = mr_put_frame_header(p, AMQP_FRAME_BODY, channel, (uint32_t)n);
    p = mr_put8(mr_put_bytes(p, from, n), MR_FRAME_END);
    from += n;
    left -= n;
  }
  return p;
}

/* ---- admission ---- */

static mr_status may_publish(const mr_channel *ch) {
  const mr_engine *e = ch->engine;
  if (!e || e->state != MR_OPEN || ch->state == MR_CH_CLOSING || ch->state == MR_CH_CLOSED)
    return MR_CLOSED;
  return e->blocked || ch->flow_off ? MR_BLOCKED : MR_OK;
}

/* Everything that can refuse a publish of `size` bytes, in the order in which it is told; makes room
 * in the output. */
static mr_status admit(mr_channel *ch, size_t header_payload, size_t body, size_t size,
                       uint8_t **place) {
  mr_engine *e = ch->engine;
  if (body > e->max_message_size || header_payload > e->tuned.frame_max - MR_FRAME_OVERHEAD)
    return MR_TOO_LARGE;
  mr_status status = ch->confirm ? mr_confirms_admit(&ch->confirms) : MR_OK;
  if (status != MR_OK) return status;
  size_t pending = mr_buffer_size(&e->tx);
  if (pending && pending + size > e->max_buffer) return MR_OVERFLOW;
  *place = mr_buffer_reserve(&e->tx, size);
  return *place ? MR_OK : MR_NO_MEMORY;
}

static mr_status sent(mr_channel *ch, const uint8_t *start, const uint8_t *end, uint64_t *seq) {
  mr_buffer *tx = &ch->engine->tx;
  size_t steps = mr_buffer_size(tx) / MR_TX_FLUSH;
  tx->tail += (size_t)(end - start);
  uint64_t number = ch->confirm ? mr_confirms_add(&ch->confirms) : 0;
  if (seq) *seq = number;
  /* Not for each publish: where the socket takes nothing, each try is a system call for nothing. */
  return mr_buffer_size(tx) / MR_TX_FLUSH > steps ? MR_FLUSH : MR_OK;
}

/* ---- properties ---- */

/* Checked properties, ready to be sent; free `edited` when they are. */
typedef struct {
  amqp_bytes_t bytes;
  mr_props_layout at;
  uint8_t *edited; /* owned; NULL where the properties are the caller's */
} outgoing;

static bool has_seq_header(const outgoing *props) {
  if (props->at.headers_len <= 4) return false;
  const uint8_t *from = props->bytes.bytes;
  amqp_bytes_t table = mr_bytes(from + props->at.headers, props->at.headers_len);
  return mr_table_find(table, mr_bytes(MR_SEQ_HEADER, SEQ_NAME)).len > 0;
}

/* A sequence header of an earlier trip must not be taken for ours. */
static mr_status remove_seq_header(outgoing *props) {
  amqp_bytes_t name = mr_bytes(MR_SEQ_HEADER, SEQ_NAME);
  size_t len;
  mr_status status = mr_props_edit(props->bytes, &name, 1, NULL, &props->edited, &len);
  if (status != MR_OK) return status;
  props->bytes = mr_bytes(props->edited, len);
  mr_props_locate(props->bytes, &props->at);
  return MR_OK;
}

static mr_status take_props(outgoing *props, amqp_bytes_t given) {
  props->bytes = given.len ? given : mr_bytes(NO_PROPS, sizeof NO_PROPS);
  props->edited = NULL;
  if (mr_props_scan(props->bytes, &props->at)) return MR_BAD_ARGUMENT;
  return has_seq_header(props) ? remove_seq_header(props) : MR_OK;
}

static size_t outgoing_size(const outgoing *props, bool with_seq) {
  return props->bytes.len + (with_seq ? seq_growth(&props->at) : 0);
}

static uint8_t *put_props(uint8_t *p, const outgoing *props, bool with_seq, uint64_t seq,
                          uint8_t **seq_at) {
  if (with_seq) return put_props_seq(p, props->bytes, &props->at, seq, seq_at);
  return mr_put_bytes(p, props->bytes.bytes, props->bytes.len);
}

/* ---- publish ---- */

static mr_status publish(mr_channel *ch, const mr_publish_args *args, const outgoing *props,
                         uint64_t *seq) {
  bool with_seq = ch->confirm && args->mandatory;
  size_t props_len = outgoing_size(props, with_seq);
  size_t header = MR_CONTENT_HEADER + props_len;
  size_t size = method_frame_size(args) + MR_FRAME_OVERHEAD + header +
                body_frames_size(ch->engine, args->body.len);
  uint8_t *start;
  mr_status status = admit(ch, header, args->body.len, size, &start);
  if (status != MR_OK) return status;
  uint8_t *seq_at;
  uint8_t *p = put_method_frame(start, ch->id, args);
  p = put_content_header(p, ch->id, props_len, args->body.len);
  p = put_props(p, props, with_seq, ch->confirms.next, &seq_at);
  p = mr_put8(p, MR_FRAME_END);
  p = put_body(ch->engine, p, ch->id, args->body);
  return sent(ch, start, p, seq);
}

static bool args_ok(const mr_publish_args *args) {
  return args->exchange.len <= MR_SHORTSTR_MAX && args->routing_key.len <= MR_SHORTSTR_MAX;
}

mr_status mr_publish(mr_channel *ch, const mr_publish_args *args, uint64_t *seq) {
  mr_status status = may_publish(ch);
  if (status != MR_OK) return status;
  if (!args_ok(args)) return MR_BAD_ARGUMENT;
  outgoing props;
  status = take_props(&props, args->props);
  if (status == MR_OK) status = publish(ch, args, &props, seq);
  free(props.edited);
  return status;
}

/* ---- prepared routes ---- */

/* The two frames in front of the body, with places to patch. */
typedef struct {
  uint8_t *bytes;
  size_t len;
  size_t header; /* where the header frame starts */
  size_t seq;    /* where the sequence number stands; 0: nowhere */
  size_t stamp;  /* where the last digits of the message id stand; 0: nowhere */
} prepared;

struct mr_route {
  prepared plain;    /* for channels without confirms, or not mandatory */
  prepared numbered; /* bytes NULL where it is not mandatory */
};

static bool prepare(prepared *out, const mr_publish_args *args, const outgoing *props,
                    bool with_seq) {
  size_t props_len = outgoing_size(props, with_seq);
  out->header = method_frame_size(args);
  out->len = out->header + MR_FRAME_OVERHEAD + MR_CONTENT_HEADER + props_len;
  out->bytes = malloc(out->len);
  if (!out->bytes) return false;
  uint8_t *seq_at = out->bytes;
  uint8_t *p = put_method_frame(out->bytes, 0, args);
  p = put_content_header(p, 0, props_len, 0);
  p = put_props(p, props, with_seq, 0, &seq_at);
  mr_put8(p, MR_FRAME_END);
  out->seq = (size_t)(seq_at - out->bytes);
  amqp_bytes_t id = mr_props_message_id(props->bytes);
  if (id.len >= STAMP) {
    size_t end = (size_t)((const uint8_t *)id.bytes + id.len - (const uint8_t *)props->bytes.bytes);
    out->stamp = out->len - 1 - (props->bytes.len - end) - STAMP; /* it stands behind the headers */
  }
  return true;
}

static mr_route *new_route(const mr_publish_args *args, const outgoing *props) {
  mr_route *r = calloc(1, sizeof *r);
  bool ok = r && prepare(&r->plain, args, props, false) &&
            (!args->mandatory || prepare(&r->numbered, args, props, true));
  if (ok) return r;
  mr_route_free(r);
  return NULL;
}

mr_status mr_route_new(const mr_publish_args *args, mr_route **route) {
  if (!args_ok(args)) return MR_BAD_ARGUMENT;
  outgoing props;
  mr_status status = take_props(&props, args->props);
  if (status == MR_OK) {
    *route = new_route(args, &props);
    if (!*route) status = MR_NO_MEMORY;
  }
  free(props.edited);
  return status;
}

static void stamp(const prepared *r, uint64_t number) {
  static const char digits[] = "0123456789abcdef";
  uint8_t *at = r->bytes + r->stamp;
  for (int i = STAMP - 1; i >= 0; i--, number >>= 4) at[i] = (uint8_t)digits[number & 15];
}

mr_status mr_route_stamp(mr_route *route, uint64_t number) {
  if (!route->plain.stamp) return MR_BAD_ARGUMENT;
  stamp(&route->plain, number);
  if (route->numbered.bytes) stamp(&route->numbered, number);
  return MR_OK;
}

void mr_route_free(mr_route *route) {
  if (!route) return;
  free(route->plain.bytes);
  free(route->numbered.bytes);
  free(route);
}

static uint8_t *put_prepared(uint8_t *p, const prepared *r, uint16_t channel, uint64_t body,
                             uint64_t seq) {
  memcpy(p, r->bytes, r->len);
  mr_put16(p + 1, channel);
  mr_put16(p + r->header + 1, channel);
  mr_put64(p + r->header + MR_FRAME_HEADER + 4, body);
  if (r->seq) mr_put64(p + r->seq, seq);
  return p + r->len;
}

mr_status mr_publish_route(mr_channel *ch, const mr_route *route, amqp_bytes_t body,
                           uint64_t *seq) {
  mr_status status = may_publish(ch);
  if (status != MR_OK) return status;
  const prepared *r = ch->confirm && route->numbered.bytes ? &route->numbered : &route->plain;
  size_t header = r->len - r->header - MR_FRAME_OVERHEAD;
  size_t size = r->len + body_frames_size(ch->engine, body.len);
  uint8_t *start;
  status = admit(ch, header, body.len, size, &start);
  if (status != MR_OK) return status;
  uint8_t *p = put_prepared(start, r, ch->id, body.len, ch->confirms.next);
  p = put_body(ch->engine, p, ch->id, body);
  return sent(ch, start, p, seq);
}
