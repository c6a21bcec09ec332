/* Tables and properties: encoded, checked, decoded, edited without loss. */
#include "peer.h"

/* ---- random properties ---- */

static char POOL[70000]; /* strings of random things point into it */

static amqp_bytes_t some_bytes(uint32_t most) {
  uint32_t n = check_below(4) ? check_below(12) : check_below(most + 1);
  return (amqp_bytes_t){.len = n, .bytes = POOL + check_below((uint32_t)sizeof POOL - most)};
}

static amqp_field_value_t random_value(amqp_pool_t *pool, int depth);

static amqp_table_t random_table(amqp_pool_t *pool, int depth, uint32_t most) {
  amqp_table_t table = {.num_entries = (int)check_below(most + 1), .entries = NULL};
  table.entries = amqp_pool_alloc(pool, ((size_t)table.num_entries + 1) * sizeof *table.entries);
  for (int i = 0; i < table.num_entries; i++) {
    table.entries[i].key = some_bytes(255);
    table.entries[i].value = random_value(pool, depth);
  }
  return table;
}

static amqp_field_value_t random_value(amqp_pool_t *pool, int depth) {
  static const char kinds[] = {
      AMQP_FIELD_KIND_BOOLEAN, AMQP_FIELD_KIND_I8,    AMQP_FIELD_KIND_U8,
      AMQP_FIELD_KIND_I16,     AMQP_FIELD_KIND_U16,   AMQP_FIELD_KIND_I32,
      AMQP_FIELD_KIND_U32,     AMQP_FIELD_KIND_I64,   AMQP_FIELD_KIND_U64,
      AMQP_FIELD_KIND_F32,     AMQP_FIELD_KIND_F64,   AMQP_FIELD_KIND_DECIMAL,
      AMQP_FIELD_KIND_UTF8,    AMQP_FIELD_KIND_BYTES, AMQP_FIELD_KIND_TIMESTAMP,
      AMQP_FIELD_KIND_VOID,    AMQP_FIELD_KIND_TABLE, AMQP_FIELD_KIND_ARRAY};
  amqp_field_value_t v = {.kind = (uint8_t)kinds[check_below(sizeof kinds)]};
  switch (v.kind) {
    case AMQP_FIELD_KIND_BOOLEAN: v.value.boolean = (int)check_below(2); break;
    case AMQP_FIELD_KIND_DECIMAL:
      v.value.decimal.decimals = (uint8_t)check_random();
      v.value.decimal.value = (uint32_t)check_random();
      break;
    case AMQP_FIELD_KIND_UTF8:
    case AMQP_FIELD_KIND_BYTES: v.value.bytes = some_bytes(400); break;
    case AMQP_FIELD_KIND_TABLE:
      v.value.table = random_table(pool, depth + 1, depth < 5 ? 4 : 0);
      break;
    case AMQP_FIELD_KIND_ARRAY:
      v.value.array.num_entries = depth < 5 ? (int)check_below(4) : 0;
      v.value.array.entries = amqp_pool_alloc(pool, 4 * sizeof *v.value.array.entries);
      for (int i = 0; i < v.value.array.num_entries; i++)
        v.value.array.entries[i] = random_value(pool, depth + 1);
      break;
    default: v.value.u64 = check_random();
  }
  return v;
}

static amqp_basic_properties_t random_props(amqp_pool_t *pool) {
  amqp_basic_properties_t props = {._flags = (amqp_flags_t)(check_random() & 0xFFFC)};
  props.content_type = some_bytes(255);
  props.content_encoding = some_bytes(255);
  props.headers = random_table(pool, 1, 6);
  props.delivery_mode = (uint8_t)check_random();
  props.priority = (uint8_t)check_random();
  props.correlation_id = some_bytes(255);
  props.reply_to = some_bytes(255);
  props.expiration = some_bytes(255);
  props.message_id = some_bytes(255);
  props.timestamp = check_random();
  props.type = some_bytes(255);
  props.user_id = some_bytes(255);
  props.app_id = some_bytes(255);
  props.cluster_id = some_bytes(255);
  return props;
}

static amqp_bytes_t encode(const amqp_basic_properties_t *props) {
  uint8_t *bytes = NULL;
  size_t n = 0;
  CHECK_EQ(mr_props_encode(props, &bytes, &n), MR_OK);
  return (amqp_bytes_t){.len = n, .bytes = bytes};
}

static void fill_pool(void) {
  for (size_t i = 0; i < sizeof POOL; i++) POOL[i] = (char)check_random();
}

static void what_is_encoded_checks_and_decodes(void) {
  fill_pool();
  for (int round = 0; round < 3000; round++) {
    static uint8_t again[1 << 20];
    amqp_pool_t pool;
    init_amqp_pool(&pool, 4096);
    amqp_basic_properties_t props = random_props(&pool), *back = NULL;
    amqp_bytes_t raw = encode(&props);
    long n;
    if (mr_props_check(raw)) FAIL("refused: %s", mr_props_check(raw));
    CHECK_EQ(mr_props_decode(raw, &pool, &back), MR_OK);
    CHECK_EQ(back->_flags, props._flags);
    n = mr_props_encode_to(back, again, sizeof again);
    CHECK_BYTES(again, n < 0 ? 0 : (size_t)n, raw.bytes, raw.len);
    CHECK(mr_props_encode_to(&props, again, raw.len - 1) < 0);
    CHECK_EQ(mr_props_encode_to(&props, again, raw.len), (long)raw.len);
    free(raw.bytes);
    empty_amqp_pool(&pool);
  }
}

/* A copy that ends where its memory ends, so that a reader of one byte too many is caught. */
static amqp_bytes_t exact(const void *bytes, size_t n) {
  uint8_t *copy = malloc(n ? n : 1);
  if (!copy) abort();
  if (n) memcpy(copy, bytes, n);
  return (amqp_bytes_t){.len = n, .bytes = copy};
}

static void every_truncation_is_refused(void) {
  fill_pool();
  for (int round = 0; round < 60; round++) {
    amqp_pool_t pool;
    init_amqp_pool(&pool, 4096);
    amqp_basic_properties_t props = random_props(&pool);
    amqp_bytes_t raw = encode(&props);
    for (size_t n = 0; n < raw.len && n < 3000; n++) {
      amqp_bytes_t cut = exact(raw.bytes, n);
      if (!mr_props_check(cut)) FAIL("%zu of %zu bytes are accepted", n, raw.len);
      free(cut.bytes);
    }
    amqp_bytes_t more = {.len = raw.len + 1, .bytes = malloc(raw.len + 1)};
    CHECK(more.bytes);
    memcpy(more.bytes, raw.bytes, raw.len);
    ((uint8_t *)more.bytes)[raw.len] = 0;
    CHECK(mr_props_check(more));
    free(more.bytes);
    free(raw.bytes);
    empty_amqp_pool(&pool);
  }
}

/* Bytes changed at random: refused, or safe to decode and to edit. */
static void corrupted_properties_are_refused_or_safe(void) {
  fill_pool();
  for (int round = 0; round < 20000; round++) {
    amqp_pool_t pool;
    init_amqp_pool(&pool, 4096);
    amqp_basic_properties_t props = random_props(&pool), *back = NULL;
    amqp_bytes_t raw = encode(&props), copy = exact(raw.bytes, raw.len);
    for (uint32_t n = 1 + check_below(4); n; n--)
      ((uint8_t *)
           copy.bytes)[check_below((uint32_t)(check_below(2) && copy.len > 30 ? 30 : copy.len))] =
          (uint8_t)check_random();
    if (!mr_props_check(copy)) {
      uint8_t *out = NULL;
      size_t n = 0;
      CHECK_EQ(mr_props_decode(copy, &pool, &back), MR_OK);
      CHECK_EQ(mr_props_edit(copy, NULL, 0, NULL, &out, &n), MR_OK);
      CHECK_BYTES(out, n, copy.bytes, copy.len);
      free(out);
    }
    free(copy.bytes);
    free(raw.bytes);
    empty_amqp_pool(&pool);
  }
}

static void malformed_tables_are_refused(void) {
  static const struct {
    const char *bytes;
    size_t n;
  } bad[] = {
      {"", 0},
      {"\0\0\0", 3},
      {"\0\0\0\1", 4},
      {"\0\0\0\0\0", 5},
      {"\0\0\0\1\0", 5}, /* a name and no value */
      {"\0\0\0\1\5", 5},
      {"\0\0\0\2\0t", 6}, /* no boolean behind its type */
      {"\0\0\0\3\1kt", 7},
      {"\0\0\0\3\1kz", 7},          /* an unknown type */
      {"\0\0\0\7\1kS\0\0\0\1", 11}, /* a string longer than the table */
      {"\0\0\0\7\1kx\xFF\xFF\xFF\xFF", 11},
      {"\0\0\0\7\1kF\0\0\0\1", 11},
      {"\0\0\0\7\1kA\0\0\0\1", 11},
      {"\0\0\0\x08\1kA\0\0\0\1z", 12},
      {"\0\0\0\6\1kD\0\0\0", 10}, /* half a decimal */
      {"\xFF\xFF\xFF\xFF\1kV", 7},
      {"\x7F\xFF\xFF\xFF\1kV", 7},
  };
  static const struct {
    const char *bytes;
    size_t n;
  } good[] = {{"\0\0\0\0", 4},
              {"\0\0\0\2\0V", 6},
              {"\0\0\0\3\1kV", 7},
              {"\0\0\0\4\1kt\1", 8},
              {"\0\0\0\7\1kS\0\0\0\0", 11},
              {"\0\0\0\7\1kF\0\0\0\0", 11},
              {"\0\0\0\x09\1kA\0\0\0\2VV", 13}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    amqp_bytes_t table = exact(bad[i].bytes, bad[i].n);
    if (!mr_table_check(table)) FAIL("table %zu is accepted", i);
    free(table.bytes);
  }
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    amqp_bytes_t table = exact(good[i].bytes, good[i].n);
    if (mr_table_check(table)) FAIL("table %zu is refused: %s", i, mr_table_check(table));
    free(table.bytes);
  }
  CHECK(mr_table_check((amqp_bytes_t){.len = 0, .bytes = NULL}));
  CHECK(mr_props_check((amqp_bytes_t){.len = 0, .bytes = NULL}));
}

/* `depth` tables or arrays, each in the one before. */
static amqp_bytes_t nested(int depth, bool arrays) {
  size_t n = 4 + (size_t)(arrays ? 5 : 6) * (size_t)(depth - 1) + (arrays && depth > 1 ? 1 : 0), at;
  uint8_t *bytes = calloc(1, n);
  if (!bytes) abort();
  peer_be(bytes, n - 4, 4);
  at = 4;
  for (int i = 1; i < depth; i++) {
    if (!arrays || i == 1) bytes[at++] = 0; /* an empty name */
    bytes[at++] = arrays ? 'A' : 'F';
    peer_be(bytes + at, n - at - 4, 4);
    at += 4;
  }
  return (amqp_bytes_t){.len = at, .bytes = bytes};
}

static void nesting_is_bounded(void) {
  for (int arrays = 0; arrays < 2; arrays++)
    for (int depth = 1; depth < 2000; depth += depth < 40 ? 1 : 163) {
      amqp_bytes_t table = nested(depth, arrays);
      const char *wrong = mr_table_check(table);
      if (!wrong != (depth <= MR_MAX_NESTING))
        FAIL("depth %d of %s: %s", depth, arrays ? "arrays" : "tables", wrong ? wrong : "accepted");
      if (!wrong) {
        amqp_pool_t pool;
        amqp_table_t decoded;
        size_t offset = 0;
        init_amqp_pool(&pool, 4096);
        CHECK_EQ(amqp_decode_table(table, &pool, &decoded, &offset), 0);
        CHECK_EQ(mr_table_depth_ok(&decoded), MR_OK);
        empty_amqp_pool(&pool);
      }
      free(table.bytes);
    }
}

static void values_that_cannot_be_are_refused(void) {
  amqp_table_entry_t entry = {.key = {.len = 256, .bytes = POOL},
                              .value = {.kind = AMQP_FIELD_KIND_VOID}};
  amqp_basic_properties_t props = {._flags = AMQP_BASIC_HEADERS_FLAG,
                                   .headers = {.num_entries = 1, .entries = &entry}};
  uint8_t *out = NULL, space[2000];
  size_t n = 0;
  CHECK_EQ(mr_props_encode(&props, &out, &n), MR_BAD_ARGUMENT);
  entry.key.len = 255;
  CHECK_EQ(mr_props_encode(&props, &out, &n), MR_OK);
  free(out);
  entry.value.kind = '?';
  CHECK_EQ(mr_props_encode(&props, &out, &n), MR_BAD_ARGUMENT);
  for (int bit = 0; bit < 32; bit++) {
    memset(&props, 0, sizeof props);
    props._flags = 1u << bit;
    if (bit > 15 || bit < 2)
      CHECK_EQ(mr_props_encode_to(&props, space, sizeof space), MR_BAD_ARGUMENT);
    if (bit > 15 || bit < 2) CHECK_EQ(mr_props_encode(&props, &out, &n), MR_BAD_ARGUMENT);
  }
#define LONG(FLAG, field)                                                  \
  props = (amqp_basic_properties_t){._flags = AMQP_BASIC_##FLAG##_FLAG,    \
                                    .field = {.len = 256, .bytes = POOL}}; \
  CHECK_EQ(mr_props_encode(&props, &out, &n), MR_BAD_ARGUMENT)
  LONG(CONTENT_TYPE, content_type);
  LONG(CONTENT_ENCODING, content_encoding);
  LONG(CORRELATION_ID, correlation_id);
  LONG(REPLY_TO, reply_to);
  LONG(EXPIRATION, expiration);
  LONG(MESSAGE_ID, message_id);
  LONG(TYPE, type);
  LONG(USER_ID, user_id);
  LONG(APP_ID, app_id);
  LONG(CLUSTER_ID, cluster_id);
#undef LONG
}

/* ---- editing ---- */

static void an_edit_of_nothing_changes_nothing(void) {
  fill_pool();
  for (int round = 0; round < 3000; round++) {
    amqp_pool_t pool;
    init_amqp_pool(&pool, 4096);
    amqp_basic_properties_t props = random_props(&pool);
    amqp_bytes_t raw = encode(&props), absent = BYTES("a header that nobody has");
    amqp_table_t nothing = {.num_entries = 0, .entries = NULL};
    uint8_t *out = NULL;
    size_t n = 0;
    CHECK_EQ(mr_props_edit(raw, NULL, 0, check_below(2) ? &nothing : NULL, &out, &n), MR_OK);
    CHECK_BYTES(out, n, raw.bytes, raw.len);
    free(out);
    /* a removal that finds nothing keeps the rest, too, an empty table included or not */
    CHECK_EQ(mr_props_edit(raw, &absent, 1, NULL, &out, &n), MR_OK);
    if (props.headers.num_entries) CHECK_BYTES(out, n, raw.bytes, raw.len);
    free(out);
    free(raw.bytes);
    empty_amqp_pool(&pool);
  }
}

static bool same(amqp_bytes_t a, amqp_bytes_t b) {
  return a.len == b.len && (a.len == 0 || memcmp(a.bytes, b.bytes, a.len) == 0);
}

/* What an edit should give, the slow way: the struct edited, and encoded again. */
static void edits_equal_the_slow_way(void) {
  fill_pool();
  for (int round = 0; round < 6000; round++) {
    amqp_pool_t pool;
    init_amqp_pool(&pool, 4096);
    amqp_basic_properties_t props = random_props(&pool), want;
    amqp_table_entry_t kept[32];
    amqp_bytes_t remove[4], raw, slow;
    amqp_table_t set = random_table(&pool, 1, 3);
    size_t n_remove = check_below(4), n = 0;
    int left = 0;
    uint8_t *out = NULL;
    bool had = props._flags & AMQP_BASIC_HEADERS_FLAG;
    amqp_table_t *old = &props.headers;
    for (size_t i = 0; i < n_remove; i++)
      remove[i] = old->num_entries && check_below(3)
                      ? old->entries[check_below((uint32_t)old->num_entries)].key
                      : some_bytes(20);
    if (old->num_entries && set.num_entries && check_below(2))
      set.entries[0].key = old->entries[0].key;
    raw = encode(&props);
    for (int i = 0; had && i < old->num_entries; i++) {
      bool named = false;
      for (size_t k = 0; k < n_remove; k++) named |= same(old->entries[i].key, remove[k]);
      for (int k = 0; k < set.num_entries; k++)
        named |= same(old->entries[i].key, set.entries[k].key);
      if (!named) kept[left++] = old->entries[i];
    }
    for (int k = 0; k < set.num_entries; k++) kept[left++] = set.entries[k];
    want = props;
    want.headers = (amqp_table_t){.num_entries = left, .entries = kept};
    if (left) want._flags |= AMQP_BASIC_HEADERS_FLAG;
    if (!left && old->num_entries && n_remove)
      want._flags &= ~(amqp_flags_t)AMQP_BASIC_HEADERS_FLAG;
    slow = encode(&want);
    CHECK_EQ(mr_props_edit(raw, remove, n_remove, &set, &out, &n), MR_OK);
    if (mr_props_check((amqp_bytes_t){.len = n, .bytes = out}))
      FAIL("malformed: %s", mr_props_check((amqp_bytes_t){.len = n, .bytes = out}));
    CHECK_BYTES(out, n, slow.bytes, slow.len);
    free(out);
    free(raw.bytes);
    free(slow.bytes);
    empty_amqp_pool(&pool);
  }
}

static void the_headers_disappear_with_their_last_key(void) {
  amqp_table_entry_t entries[2] = {{.key = BYTES("a"), .value = {.kind = AMQP_FIELD_KIND_VOID}},
                                   {.key = BYTES("b"), .value = {.kind = AMQP_FIELD_KIND_VOID}}};
  amqp_basic_properties_t props = {._flags = AMQP_BASIC_HEADERS_FLAG | AMQP_BASIC_TYPE_FLAG,
                                   .type = BYTES("t"),
                                   .headers = {.num_entries = 2, .entries = entries}};
  amqp_bytes_t raw = encode(&props), names[] = {BYTES("b"), BYTES("a")};
  amqp_table_t set = {.num_entries = 1, .entries = entries};
  uint8_t *out = NULL;
  size_t n = 0;
  CHECK_EQ(mr_props_edit(raw, names, 2, NULL, &out, &n), MR_OK);
  CHECK_BYTES(out, n, "\0\x20\1t", 4);
  free(out);
  free(raw.bytes);
  /* and come with the first */
  CHECK_EQ(mr_props_edit((amqp_bytes_t){.len = 4, .bytes = (void *)(uintptr_t) "\0\x20\1t"}, NULL,
                         0, &set, &out, &n),
           MR_OK);
  CHECK_BYTES(out, n, "\x20\x20\0\0\0\3\1aV\1t", 11);
  free(out);
  CHECK_EQ(mr_props_edit((amqp_bytes_t){.len = 0, .bytes = NULL}, NULL, 0, &set, &out, &n), MR_OK);
  CHECK_BYTES(out, n, "\x20\0\0\0\0\3\1aV", 9);
  free(out);
}

static void a_set_that_cannot_be_encoded_is_refused(void) {
  amqp_table_entry_t entry = {.key = BYTES("a"), .value = {.kind = '?'}};
  amqp_table_t set = {.num_entries = 1, .entries = &entry};
  uint8_t *out = NULL;
  size_t n = 0;
  CHECK_EQ(mr_props_edit((amqp_bytes_t){.len = 2, .bytes = (void *)(uintptr_t) "\0\0"}, NULL, 0,
                         &set, &out, &n),
           MR_BAD_ARGUMENT);
  entry.value.kind = AMQP_FIELD_KIND_TABLE;
  entry.value.value.table = set; /* a circle */
  CHECK_EQ(mr_props_edit((amqp_bytes_t){.len = 2, .bytes = (void *)(uintptr_t) "\0\0"}, NULL, 0,
                         &set, &out, &n),
           MR_BAD_ARGUMENT);
}

/* The same header twice, as some clients send it: both go, or both stay in their order. */
static void double_headers_are_kept_and_removed_together(void) {
  static const uint8_t raw[] = "\x20\0\0\0\0\x09\1aV\1bV\1aV";
  amqp_bytes_t props = {.len = sizeof raw - 1, .bytes = (void *)(uintptr_t)raw}, b = BYTES("b"),
               a = BYTES("a");
  uint8_t *out = NULL;
  size_t n = 0;
  CHECK(!mr_props_check(props));
  CHECK_EQ(mr_props_edit(props, &b, 1, NULL, &out, &n), MR_OK);
  CHECK_BYTES(out, n, "\x20\0\0\0\0\6\1aV\1aV", 12);
  free(out);
  CHECK_EQ(mr_props_edit(props, &a, 1, NULL, &out, &n), MR_OK);
  CHECK_BYTES(out, n, "\x20\0\0\0\0\3\1bV", 9);
  free(out);
}

int main(int argc, char **argv) {
  check_start(argc, argv);
  RUN(what_is_encoded_checks_and_decodes);
  RUN(every_truncation_is_refused);
  RUN(corrupted_properties_are_refused_or_safe);
  RUN(malformed_tables_are_refused);
  RUN(nesting_is_bounded);
  RUN(values_that_cannot_be_are_refused);
  RUN(an_edit_of_nothing_changes_nothing);
  RUN(edits_equal_the_slow_way);
  RUN(the_headers_disappear_with_their_last_key);
  RUN(a_set_that_cannot_be_encoded_is_refused);
  RUN(double_headers_are_kept_and_removed_together);
  return check_end();
}
