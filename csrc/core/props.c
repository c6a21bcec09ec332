/* Message properties: encoded with rabbitmq-c, checked and edited as bytes. */
#include <stdlib.h>

#include "core/table.h"

/* Bit 0 would continue the flags; bit 1 belongs to no property of class basic. */
static const amqp_flags_t KNOWN_FLAGS = 0xFFFC;

/* The kinds of the fourteen properties in the order of their flags, from bit 15 down to bit 2:
 * s short string, F table, b octet, q long-long. */
static const char PROPERTY_KINDS[] = "ssFbbssssqssss";

static void skip_property(mr_reader *r, char kind) {
  switch (kind) {
    case 's': mr_read_shortstr(r); break;
    case 'b': mr_read8(r); break;
    case 'q': mr_read64(r); break;
    default: mr_read_longstr(r);
  }
}

/* Notes where the headers stand; NULL, or what is wrong with them. */
static const char *scan_headers(const mr_reader *r, const uint8_t *base, const uint8_t *start,
                                mr_props_layout *layout) {
  layout->headers_len = (size_t)(r->p - start);
  layout->headers = (size_t)(start - base);
  return mr_table_check(mr_bytes(start, layout->headers_len));
}

const char *mr_props_scan(amqp_bytes_t props, mr_props_layout *layout) {
  mr_reader r = mr_reader_of(props, true);
  const uint8_t *base = r.p;
  const char *wrong = NULL;
  *layout = (mr_props_layout){.flags = mr_read16(&r)};
  if (!r.ok) return "properties without flags";
  if (layout->flags & ~KNOWN_FLAGS) return "properties with unknown flags";
  /* Most messages have few properties: only those that are there are walked, highest flag first. */
  for (uint32_t left = layout->flags; left && !wrong;) {
    int bit = 31 - __builtin_clz(left);
    const uint8_t *start = r.p;
    left &= ~(1u << bit);
    skip_property(&r, PROPERTY_KINDS[15 - bit]);
    if (!r.ok) return "a property that is cut off";
    if (1u << bit == MR_FLAG_HEADERS) wrong = scan_headers(&r, base, start, layout);
    if (1u << bit > MR_FLAG_HEADERS) layout->headers = (size_t)(r.p - base);
  }
  if (layout->headers == 0) layout->headers = 2;
  if (wrong) return wrong;
  return r.p == r.end ? NULL : "bytes behind the properties";
}

const char *mr_props_check(amqp_bytes_t props) {
  mr_props_layout layout;
  return mr_props_scan(props, &layout);
}

void mr_props_locate(amqp_bytes_t props, mr_props_layout *layout) {
  mr_reader r = mr_reader_of(props, true);
  const uint8_t *base = r.p;
  layout->flags = mr_read16(&r);
  if (layout->flags & AMQP_BASIC_CONTENT_TYPE_FLAG) mr_read_shortstr(&r);
  if (layout->flags & AMQP_BASIC_CONTENT_ENCODING_FLAG) mr_read_shortstr(&r);
  layout->headers = (size_t)(r.p - base);
  layout->headers_len = 0;
  if (!(layout->flags & MR_FLAG_HEADERS)) return;
  mr_read_longstr(&r);
  layout->headers_len = (size_t)(r.p - base) - layout->headers;
}

amqp_bytes_t mr_props_message_id(amqp_bytes_t props) {
  mr_reader r = mr_reader_of(props, true);
  uint32_t flags = mr_read16(&r);
  if (!(flags & AMQP_BASIC_MESSAGE_ID_FLAG)) return mr_bytes(NULL, 0);
  for (int bit = 15; 1u << bit > AMQP_BASIC_MESSAGE_ID_FLAG; bit--)
    if (flags & 1u << bit) skip_property(&r, PROPERTY_KINDS[15 - bit]);
  return mr_read_shortstr(&r);
}

bool mr_props_has_header(amqp_bytes_t props, amqp_bytes_t name) {
  mr_props_layout at;
  if (props.len == 0) return false;
  mr_props_locate(props, &at);
  if (at.headers_len <= 4) return false;
  const uint8_t *table = (const uint8_t *)props.bytes + at.headers;
  return mr_table_find(mr_bytes(table, at.headers_len), name).len > 0;
}

/* ---- encoding ---- */

static bool add_shortstr(const amqp_basic_properties_t *p, amqp_flags_t flag, amqp_bytes_t s,
                         size_t *size) {
  if (!(p->_flags & flag)) return true;
  *size += 1 + s.len;
  return s.len <= MR_SHORTSTR_MAX;
}

/* Exact encoded size; 0: a value cannot be encoded. */
static size_t props_size(const amqp_basic_properties_t *p) {
  size_t size = 2;
  bool ok = add_shortstr(p, AMQP_BASIC_CONTENT_TYPE_FLAG, p->content_type, &size) &&
            add_shortstr(p, AMQP_BASIC_CONTENT_ENCODING_FLAG, p->content_encoding, &size) &&
            add_shortstr(p, AMQP_BASIC_CORRELATION_ID_FLAG, p->correlation_id, &size) &&
            add_shortstr(p, AMQP_BASIC_REPLY_TO_FLAG, p->reply_to, &size) &&
            add_shortstr(p, AMQP_BASIC_EXPIRATION_FLAG, p->expiration, &size) &&
            add_shortstr(p, AMQP_BASIC_MESSAGE_ID_FLAG, p->message_id, &size) &&
            add_shortstr(p, AMQP_BASIC_TYPE_FLAG, p->type, &size) &&
            add_shortstr(p, AMQP_BASIC_USER_ID_FLAG, p->user_id, &size) &&
            add_shortstr(p, AMQP_BASIC_APP_ID_FLAG, p->app_id, &size) &&
            add_shortstr(p, AMQP_BASIC_CLUSTER_ID_FLAG, p->cluster_id, &size);
  if (!ok) return 0;
  if (p->_flags & AMQP_BASIC_HEADERS_FLAG) {
    size_t headers = mr_table_size(&p->headers);
    if (!headers) return 0;
    size += headers;
  }
  if (p->_flags & AMQP_BASIC_DELIVERY_MODE_FLAG) size += 1;
  if (p->_flags & AMQP_BASIC_PRIORITY_FLAG) size += 1;
  if (p->_flags & AMQP_BASIC_TIMESTAMP_FLAG) size += 8;
  return size;
}

long mr_props_encode_to(const amqp_basic_properties_t *props, uint8_t *out, size_t space) {
  if (props->_flags & ~KNOWN_FLAGS) return MR_BAD_ARGUMENT;
  size_t size = props_size(props);
  if (!size) return MR_BAD_ARGUMENT;
  if (size > space) return MR_TOO_LARGE;
  int n = amqp_encode_properties(AMQP_BASIC_CLASS, (void *)(uintptr_t)props, mr_bytes(out, space));
  return n < 0 ? MR_BAD_ARGUMENT : n;
}

mr_status mr_props_encode(const amqp_basic_properties_t *props, uint8_t **out, size_t *len) {
  size_t size = props_size(props);
  if (!size) return MR_BAD_ARGUMENT;
  uint8_t *bytes = malloc(size);
  if (!bytes) return MR_NO_MEMORY;
  long n = mr_props_encode_to(props, bytes, size);
  if (n < 0) {
    free(bytes);
    return (mr_status)n;
  }
  *out = bytes;
  *len = (size_t)n;
  return MR_OK;
}

mr_status mr_props_decode(amqp_bytes_t props, amqp_pool_t *pool, amqp_basic_properties_t **out) {
  void *decoded = NULL;
  int n = amqp_decode_properties(AMQP_BASIC_CLASS, pool, props, &decoded);
  if (n < 0) return n == AMQP_STATUS_NO_MEMORY ? MR_NO_MEMORY : MR_BAD_ARGUMENT;
  *out = decoded;
  return MR_OK;
}

/* ---- editing ---- */

static bool is_named(amqp_bytes_t name, const amqp_bytes_t *remove, size_t n_remove,
                     const amqp_table_t *set) {
  for (size_t i = 0; i < n_remove; i++)
    if (mr_bytes_equal(name, remove[i])) return true;
  for (int i = 0; set && i < set->num_entries; i++)
    if (mr_bytes_equal(name, set->entries[i].key)) return true;
  return false;
}

/* Copies the entries of a checked table that nobody named. */
static uint8_t *copy_entries(uint8_t *to, amqp_bytes_t table, const amqp_bytes_t *remove,
                             size_t n_remove, const amqp_table_t *set) {
  if (table.len == 0) return to;
  mr_reader r = mr_table_entries(table);
  amqp_bytes_t name, entry;
  while (mr_table_next(&r, &name, &entry))
    if (!is_named(name, remove, n_remove, set)) to = mr_put_bytes(to, entry.bytes, entry.len);
  return to;
}

/* Appends the entries of `set`; NULL: they cannot be encoded. rabbitmq-c writes a length in front of
 * a table, so the four bytes that stand there already are kept aside. */
static uint8_t *append_entries(uint8_t *to, const amqp_table_t *set, size_t size) {
  uint8_t kept[4];
  uint8_t *start = to - 4;
  size_t offset = 0;
  memcpy(kept, start, 4);
  if (amqp_encode_table(mr_bytes(start, size), (amqp_table_t *)(uintptr_t)set, &offset) < 0)
    return NULL;
  memcpy(start, kept, 4);
  return start + offset;
}

mr_status mr_props_edit(amqp_bytes_t props, const amqp_bytes_t *remove, size_t n_remove,
                        const amqp_table_t *set, uint8_t **out, size_t *len) {
  static const uint8_t NO_PROPS[2] = {0, 0};
  if (props.len == 0) props = mr_bytes(NO_PROPS, sizeof NO_PROPS);
  const uint8_t *from = props.bytes;
  size_t set_size = set && set->num_entries ? mr_table_size(set) : 4;
  if (!set_size) return MR_BAD_ARGUMENT;
  mr_props_layout at;
  mr_props_locate(props, &at);
  uint8_t *bytes = malloc(props.len + 4 + set_size);
  if (!bytes) return MR_NO_MEMORY;

  uint8_t *table = mr_put_bytes(bytes, from, at.headers);
  uint8_t *entries = table + 4;
  uint8_t *to =
      copy_entries(entries, mr_bytes(from + at.headers, at.headers_len), remove, n_remove, set);
  if (set_size > 4) to = append_entries(to, set, set_size);
  if (!to) {
    free(bytes);
    return MR_BAD_ARGUMENT;
  }
  bool was_empty = at.headers_len <= 4;
  bool keep = to > entries || (at.headers_len && (was_empty || !n_remove));
  if (keep)
    mr_put32(table, (uint32_t)(to - entries));
  else
    to = table;
  mr_put16(bytes, (uint16_t)(keep ? at.flags | MR_FLAG_HEADERS : at.flags & ~MR_FLAG_HEADERS));
  size_t rest = at.headers + at.headers_len;
  to = mr_put_bytes(to, from + rest, props.len - rest);
  *out = bytes;
  *len = (size_t)(to - bytes);
  return MR_OK;
}
