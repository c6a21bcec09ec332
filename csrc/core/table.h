/* Tables and properties as bytes: checks before a decoder sees them, sizes before encoding. */
#ifndef MR_TABLE_H
#define MR_TABLE_H

#include "core/wire.h"

/* Where the headers table stands in raw properties. */
typedef struct {
  uint16_t flags;
  size_t headers;     /* offset of the headers table, or of the place where it would stand */
  size_t headers_len; /* with its 4-byte length; 0: there is none */
} mr_props_layout;

enum { MR_FLAG_HEADERS = AMQP_BASIC_HEADERS_FLAG };

/* NULL, or what is wrong with raw properties (static text). */
const char *mr_props_scan(amqp_bytes_t props, mr_props_layout *layout);

/* Offset of the layout of properties known to be well-formed. Cheaper than mr_props_scan. */
void mr_props_locate(amqp_bytes_t props, mr_props_layout *layout);

/* Walks the entries of a checked table (with its 4-byte length). */
mr_reader mr_table_entries(amqp_bytes_t table);
/* The next entry: its name, and its bytes, name and all. False behind the last. */
bool mr_table_next(mr_reader *r, amqp_bytes_t *name, amqp_bytes_t *entry);
/* The bytes of the entry of that name; len 0: not there. */
amqp_bytes_t mr_table_find(amqp_bytes_t table, amqp_bytes_t key);

/* Exact size of a table once encoded, with its 4-byte length; 0: cannot be encoded (nested too deep,
 * a key over 255 bytes, an unknown kind). */
size_t mr_table_size(const amqp_table_t *table);

#endif
