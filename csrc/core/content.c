/* Contents: messages that arrive as a method, a header and any number of body frames. */
#include "core/engine.h"

enum { KEEP_BYTES = 65536 }; /* a larger buffer is given back once its message was taken */

void mr_assembly_free(mr_assembly *a) {
  mr_buffer_free(&a->strings);
  mr_buffer_free(&a->props);
  mr_buffer_free(&a->body);
}

static void reset_buffer(mr_buffer *b) {
  if (b->cap > KEEP_BYTES)
    mr_buffer_free(b);
  else
    b->head = b->tail = 0;
}

void mr_content_reset(mr_channel *ch) {
  mr_assembly *a = &ch->assembly;
  a->method = 0;
  reset_buffer(&a->strings);
  reset_buffer(&a->props);
  reset_buffer(&a->body);
}

static void out_of_memory(mr_channel *ch) {
  mr_end(ch->engine, MR_KIND_MEMORY, 0, "out of memory for a message");
}

/* The receive buffer may move before the content is whole, so its strings are copied aside. */
static void keep(mr_buffer *to, amqp_bytes_t *s) {
  uint8_t *p = to->data + to->tail;
  mr_put_bytes(p, s->bytes, s->len);
  to->tail += s->len;
  s->bytes = p;
}

static void read_deliver(mr_reader *r, mr_content *c) {
  c->consumer_tag = mr_read_shortstr(r);
  c->delivery_tag = mr_read64(r);
  c->redelivered = mr_read8(r) & 1;
  c->exchange = mr_read_shortstr(r);
  c->routing_key = mr_read_shortstr(r);
}

static void read_get_ok(mr_reader *r, mr_content *c) {
  c->delivery_tag = mr_read64(r);
  c->redelivered = mr_read8(r) & 1;
  c->exchange = mr_read_shortstr(r);
  c->routing_key = mr_read_shortstr(r);
  c->message_count = mr_read32(r);
}

static void read_return(mr_reader *r, mr_content *c) {
  c->reply_code = mr_read16(r);
  c->reply_text = mr_read_shortstr(r);
  c->exchange = mr_read_shortstr(r);
  c->routing_key = mr_read_shortstr(r);
}

static bool find_consumer(mr_channel *ch, mr_content *c) {
  const mr_consumer *consumer = mr_consumers_find(ch, c->consumer_tag);
  if (!consumer) return false;
  c->consumer_ref = consumer->ref;
  c->no_ack = consumer->no_ack;
  return true;
}

static bool take_get(mr_channel *ch, mr_content *c) {
  mr_call_entry call;
  if (!mr_calls_take(&ch->calls, AMQP_BASIC_GET_OK_METHOD, &call)) return false;
  c->no_ack = call.no_ack;
  return true;
}

void mr_content_begin(mr_channel *ch, amqp_method_number_t method, amqp_bytes_t args) {
  mr_engine *e = ch->engine;
  mr_assembly *a = &ch->assembly;
  mr_content *c = &a->content;
  mr_reader r = mr_reader_of(args, true);
  *c = (mr_content){0};
  a->discard = ch->state != MR_CH_OPEN;
  bool expected = true;
  if (method == AMQP_BASIC_DELIVER_METHOD) {
    read_deliver(&r, c);
    expected = a->discard || find_consumer(ch, c);
  } else if (method == AMQP_BASIC_GET_OK_METHOD) {
    read_get_ok(&r, c);
    expected = take_get(ch, c);
  } else {
    read_return(&r, c);
  }
  if (!r.ok || r.p != r.end) {
    mr_protocol_error(e, AMQP_SYNTAX_ERROR, "channel %u: malformed content method", ch->id);
    return;
  }
  if (!expected) {
    mr_protocol_error(e, AMQP_COMMAND_INVALID, "channel %u: a %s that nobody asked for", ch->id,
                      method == AMQP_BASIC_DELIVER_METHOD ? "delivery" : "get-ok");
    return;
  }
  if (!mr_buffer_reserve(&a->strings, args.len)) {
    out_of_memory(ch);
    return;
  }
  keep(&a->strings, &c->consumer_tag);
  keep(&a->strings, &c->exchange);
  keep(&a->strings, &c->routing_key);
  keep(&a->strings, &c->reply_text);
  a->method = method;
  a->have_header = false;
}

/* The number under which the publish that came back was sent, if it carries one of ours. */
static uint64_t returned_seq(mr_channel *ch, amqp_bytes_t props) {
  mr_props_layout at;
  mr_props_locate(props, &at);
  amqp_bytes_t table = mr_bytes((const uint8_t *)props.bytes + at.headers, at.headers_len);
  amqp_bytes_t name = mr_bytes(MR_SEQ_HEADER, sizeof MR_SEQ_HEADER - 1);
  amqp_bytes_t entry = mr_table_find(table, name);
  if (entry.len != 1 + name.len + 9) return 0;
  const uint8_t *value = (const uint8_t *)entry.bytes + 1 + name.len;
  if (*value != AMQP_FIELD_KIND_I64) return 0;
  uint64_t seq = mr_get64(value + 1);
  return ch->confirm && mr_confirms_returned(&ch->confirms, seq) ? seq : 0;
}

/* The delivery is whole: it enters the ack window. */
static bool count_delivery(mr_channel *ch, const mr_content *c) {
  bool not_ours = c->no_ack || ch->recovering;
  mr_status status = mr_acks_add(&ch->acks, c->delivery_tag, not_ours);
  if (ch->recovering) ch->acks.recovered = ch->acks.last_tag;
  if (status == MR_NO_MEMORY) out_of_memory(ch);
  if (status == MR_BAD_ARGUMENT)
    mr_protocol_error(ch->engine, AMQP_COMMAND_INVALID, "channel %u: delivery tags do not grow",
                      ch->id);
  return status == MR_OK;
}

static bool complete(mr_channel *ch, amqp_bytes_t body, mr_event *event) {
  mr_assembly *a = &ch->assembly;
  mr_content *c = &a->content;
  amqp_method_number_t method = a->method;
  a->method = 0;
  if (a->discard) {
    mr_content_reset(ch);
    return false;
  }
  c->body = body;
  if (method == AMQP_BASIC_RETURN_METHOD)
    c->seq = returned_seq(ch, c->props);
  else if (!count_delivery(ch, c))
    return false;
  event->type = method == AMQP_BASIC_DELIVER_METHOD  ? MR_EV_DELIVER
                : method == AMQP_BASIC_GET_OK_METHOD ? MR_EV_GET_OK
                                                     : MR_EV_RETURN;
  event->channel = ch;
  event->content = *c;
  ch->engine->delivering = ch;
  return true;
}

bool mr_content_header(mr_channel *ch, amqp_bytes_t payload, mr_event *event) {
  mr_engine *e = ch->engine;
  mr_assembly *a = &ch->assembly;
  const uint8_t *p = payload.bytes;
  if (!a->method || a->have_header || payload.len < MR_CONTENT_HEADER + 2 ||
      mr_get16(p) != AMQP_BASIC_CLASS) {
    mr_protocol_error(e, AMQP_UNEXPECTED_FRAME, "channel %u: a content header out of place",
                      ch->id);
    return false;
  }
  amqp_bytes_t props = mr_bytes(p + MR_CONTENT_HEADER, payload.len - MR_CONTENT_HEADER);
  const char *wrong = mr_props_check(props);
  a->size = mr_get64(p + 4);
  if (wrong) {
    mr_protocol_error(e, AMQP_SYNTAX_ERROR, "channel %u: %s", ch->id, wrong);
    return false;
  }
  if (a->size > e->max_message_size) {
    mr_protocol_error(e, AMQP_CONTENT_TOO_LARGE,
                      "channel %u: a message of %llu bytes, over max_message_size of %llu", ch->id,
                      (unsigned long long)a->size, (unsigned long long)e->max_message_size);
    return false;
  }
  if (!mr_buffer_reserve(&a->props, props.len)) {
    out_of_memory(ch);
    return false;
  }
  a->content.props = props;
  keep(&a->props, &a->content.props);
  a->have_header = true;
  return a->size == 0 && complete(ch, mr_bytes(NULL, 0), event);
}

bool mr_content_body(mr_channel *ch, amqp_bytes_t payload, mr_event *event) {
  mr_assembly *a = &ch->assembly;
  size_t have = mr_buffer_size(&a->body);
  if (!a->method || !a->have_header || payload.len > a->size - have) {
    mr_protocol_error(ch->engine, AMQP_UNEXPECTED_FRAME, "channel %u: a body frame out of place",
                      ch->id);
    return false;
  }
  if (payload.len == 0) return false;
  if (payload.len == a->size) return complete(ch, payload, event);
  /* Room grows with what has come, not with what was announced. */
  if (!mr_buffer_reserve(&a->body, payload.len)) {
    out_of_memory(ch);
    return false;
  }
  mr_put_bytes(a->body.data + a->body.tail, payload.bytes, payload.len);
  a->body.tail += payload.len;
  if (mr_buffer_size(&a->body) < a->size) return false;
  return complete(ch, mr_bytes(a->body.data, mr_buffer_size(&a->body)), event);
}
