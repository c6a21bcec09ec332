#include "core/table.h"

/* ---- checking what came from the network ---- */

static const char *check_table(mr_reader *r, int depth);

/* Size of a value of fixed length; -1: it has none. */
static int fixed_size(uint8_t kind) {
  switch (kind) {
    case AMQP_FIELD_KIND_VOID: return 0;
    case AMQP_FIELD_KIND_BOOLEAN:
    case AMQP_FIELD_KIND_I8:
    case AMQP_FIELD_KIND_U8: return 1;
    case AMQP_FIELD_KIND_I16:
    case AMQP_FIELD_KIND_U16: return 2;
    case AMQP_FIELD_KIND_I32:
    case AMQP_FIELD_KIND_U32:
    case AMQP_FIELD_KIND_F32: return 4;
    case AMQP_FIELD_KIND_DECIMAL: return 5;
    case AMQP_FIELD_KIND_I64:
    case AMQP_FIELD_KIND_U64:
    case AMQP_FIELD_KIND_F64:
    case AMQP_FIELD_KIND_TIMESTAMP: return 8;
    default: return -1;
  }
}

static mr_reader sub_reader(mr_reader *r) {
  amqp_bytes_t inner = mr_read_longstr(r);
  return mr_reader_of(inner, r->ok);
}

static const char *check_value(mr_reader *r, int depth);

static const char *check_array(mr_reader *r, int depth) {
  mr_reader sub = sub_reader(r);
  if (!sub.ok) return "an array longer than what holds it";
  while (sub.p < sub.end) {
    const char *wrong = check_value(&sub, depth);
    if (wrong) return wrong;
  }
  return NULL;
}

static const char *check_value(mr_reader *r, int depth) {
  uint8_t kind = mr_read8(r);
  if (!r->ok) return "a field without a type";
  int size = fixed_size(kind);
  if (size >= 0) {
    if (r->end - r->p < size) return "a field value that is cut off";
    r->p += size;
    return NULL;
  }
  if (kind == AMQP_FIELD_KIND_UTF8 || kind == AMQP_FIELD_KIND_BYTES) {
    mr_read_longstr(r);
    return r->ok ? NULL : "a string longer than what holds it";
  }
  if (depth >= MR_MAX_NESTING) return "tables nested too deep";
  if (kind == AMQP_FIELD_KIND_TABLE) return check_table(r, depth + 1);
  if (kind == AMQP_FIELD_KIND_ARRAY) return check_array(r, depth + 1);
  return "a field of an unknown type";
}

static const char *check_table(mr_reader *r, int depth) {
  mr_reader sub = sub_reader(r);
  if (!sub.ok) return "a table longer than what holds it";
  while (sub.p < sub.end) {
    mr_read_shortstr(&sub);
    if (!sub.ok) return "a field name that is cut off";
    const char *wrong = check_value(&sub, depth);
    if (wrong) return wrong;
  }
  return NULL;
}

const char *mr_table_check(amqp_bytes_t table) {
  mr_reader r = mr_reader_of(table, true);
  const char *wrong = check_table(&r, 1);
  if (wrong) return wrong;
  return r.p == r.end ? NULL : "bytes behind a table";
}

/* ---- walking a checked table ---- */

mr_reader mr_table_entries(amqp_bytes_t table) {
  const uint8_t *p = table.bytes;
  mr_reader r = {p + 4, p + table.len, true};
  return r;
}

static void skip_value(mr_reader *r) {
  int size = fixed_size(mr_read8(r));
  if (size >= 0)
    r->p += size;
  else
    mr_read_longstr(r);
}

bool mr_table_next(mr_reader *r, amqp_bytes_t *name, amqp_bytes_t *entry) {
  if (!r->ok || r->p >= r->end) return false;
  const uint8_t *start = r->p;
  *name = mr_read_shortstr(r);
  skip_value(r);
  *entry = mr_bytes(start, (size_t)(r->p - start));
  return r->ok;
}

amqp_bytes_t mr_table_find(amqp_bytes_t table, amqp_bytes_t key) {
  if (table.len == 0) return table;
  mr_reader r = mr_table_entries(table);
  amqp_bytes_t name, entry;
  while (mr_table_next(&r, &name, &entry))
    if (mr_bytes_equal(name, key)) return entry;
  return mr_bytes(NULL, 0);
}

/* ---- sizing what is to be encoded ---- */

static bool table_size(const amqp_table_t *table, int depth, size_t *size);

static bool value_size(const amqp_field_value_t *value, int depth, size_t *size) {
  int fixed = fixed_size(value->kind);
  *size += 1;
  if (fixed >= 0) {
    *size += (size_t)fixed;
    return true;
  }
  switch (value->kind) {
    case AMQP_FIELD_KIND_UTF8:
    case AMQP_FIELD_KIND_BYTES: *size += 4 + value->value.bytes.len; return true;
    case AMQP_FIELD_KIND_TABLE: return table_size(&value->value.table, depth + 1, size);
    case AMQP_FIELD_KIND_ARRAY: break;
    default: return false;
  }
  if (depth >= MR_MAX_NESTING) return false;
  *size += 4;
  const amqp_array_t *array = &value->value.array;
  for (int i = 0; i < array->num_entries; i++)
    if (!value_size(&array->entries[i], depth + 1, size)) return false;
  return true;
}

static bool table_size(const amqp_table_t *table, int depth, size_t *size) {
  if (depth > MR_MAX_NESTING) return false;
  *size += 4;
  for (int i = 0; i < table->num_entries; i++) {
    const amqp_table_entry_t *entry = &table->entries[i];
    if (entry->key.len > MR_SHORTSTR_MAX) return false;
    *size += 1 + entry->key.len;
    if (!value_size(&entry->value, depth, size)) return false;
  }
  return true;
}

size_t mr_table_size(const amqp_table_t *table) {
  size_t size = 0;
  return table_size(table, 1, &size) ? size : 0;
}

mr_status mr_table_depth_ok(const amqp_table_t *table) {
  return mr_table_size(table) ? MR_OK : MR_BAD_ARGUMENT;
}
