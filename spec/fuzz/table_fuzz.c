/* Any bytes as a table: refused by mr_table_check, or decoded and encoded again without loss. */
#include "../core/peer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static amqp_bytes_t encoded(amqp_table_t *table, size_t most) {
  amqp_bytes_t out = {.len = most, .bytes = malloc(most)};
  size_t offset = 0;
  if (!out.bytes) abort();
  CHECK_EQ(amqp_encode_table(out, table, &offset), 0);
  out.len = offset;
  return out;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  amqp_bytes_t raw = {.len = size, .bytes = (void *)(uintptr_t)data}, once, twice;
  amqp_table_t table;
  amqp_pool_t pool;
  size_t offset = 0;
  const char *wrong = mr_table_check(raw);
  if (wrong) {
    CHECK(*wrong);
    return 0;
  }
  init_amqp_pool(&pool, 4096);
  CHECK_EQ(amqp_decode_table(raw, &pool, &table, &offset), 0);
  CHECK_EQ(offset, size);
  CHECK_EQ(mr_table_depth_ok(&table), MR_OK);
  once = encoded(&table, size); /* never longer than it was */
  CHECK_EQ(once.len, size);
  CHECK(mr_table_check(once) == NULL);
  offset = 0;
  CHECK_EQ(amqp_decode_table(once, &pool, &table, &offset), 0);
  twice = encoded(&table, size);
  CHECK_BYTES(twice.bytes, twice.len, once.bytes, once.len);
  free(once.bytes);
  free(twice.bytes);
  empty_amqp_pool(&pool);
  return 0;
}
