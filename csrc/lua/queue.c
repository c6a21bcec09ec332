/*
 * DeliveryQueue: the messages of one consumer that Lua has not taken yet. A ring over a Lua table
 * of fixed size, so that putting and taking are one rawset and one rawget.
 */
#include "lua/binding.h"

/* The broker bounds an acking consumer by its prefetch; nothing but this bounds one without acks. */
enum { FIRST_CAPACITY = 64, MOST_MESSAGES = 4096, BESIDES_PREFETCH = 64 };
static const size_t MOST_BYTES = (size_t)16 << 20;

static mrl_queue *check_queue(lua_State *L) {
  return mrl_check_tag(L, 1, MR_IS_QUEUE, sizeof(mrl_queue));
}

mrl_queue *mrl_queue_new(lua_State *L, int anchor) {
  mrl_queue *q = mr_new_userdata(L, sizeof *q);
  memset(q, 0, sizeof *q);
  q->tag = MR_IS_QUEUE;
  q->capacity = FIRST_CAPACITY;
  lua_pushvalue(L, lua_upvalueindex(MR_UP_QUEUE));
  lua_setmetatable(L, -2);
  lua_createtable(L, MR_RING_FIRST + FIRST_CAPACITY, 0);
  lua_pushvalue(L, anchor);
  lua_rawseti(L, -2, MR_RING_ANCHOR);
  mr_set_uservalue(L, -2);
  return q;
}

/* A new table, as rehashing an old one with holes could move the ring out of its array part. */
void mrl_queue_grow(lua_State *L, mrl_queue *q, int queue, int ring) {
  lua_createtable(L, MR_RING_FIRST + (int)q->capacity * 2, 0);
  lua_rawgeti(L, ring, MR_RING_ANCHOR);
  lua_rawseti(L, -2, MR_RING_ANCHOR);
  for (uint32_t i = 0; i < q->count; i++) {
    lua_rawgeti(L, ring, MR_RING_FIRST + (int)((q->head + i) & (q->capacity - 1)));
    lua_rawseti(L, -2, MR_RING_FIRST + (int)i);
  }
  q->head = 0;
  q->capacity *= 2;
  lua_pushvalue(L, -1);
  mr_set_uservalue(L, queue);
  lua_replace(L, ring);
}

/* More than this is a broker that does not keep to its prefetch, a 16-bit number. A recover makes it deliver again
 * what still waits here. */
static uint32_t most_messages(const mrl_queue *q) {
  if (q->no_ack) return MOST_MESSAGES;
  return q->prefetch ? 2 * q->prefetch + BESIDES_PREFETCH : UINT16_MAX;
}

static size_t most_bytes(const mrl_queue *q) { return q->no_ack ? MOST_BYTES : SIZE_MAX; }

bool mrl_queue_is_over(const mrl_queue *q) {
  return !q->ending && (q->count >= most_messages(q) || q->bytes >= most_bytes(q));
}

static bool has_room(const mrl_queue *q) {
  return q->count < most_messages(q) / 2 && q->bytes < most_bytes(q) / 2;
}

void mrl_queue_unfill(mrl_queue *q) {
  if (!q->full) return;
  q->full = false;
  q->engine->n_full--;
}

static int queue_pop(lua_State *L) {
  mrl_queue *q = check_queue(L);
  if (q->count == 0) {
    lua_pushnil(L);
    return 1;
  }
  int slot = MR_RING_FIRST + (int)q->head;
  mr_get_uservalue(L, 1);
  lua_rawgeti(L, -1, slot);
  lua_pushnil(L);
  lua_rawseti(L, -3, slot);
  q->head = (q->head + 1) & (q->capacity - 1);
  q->count--;
  q->bytes -= ((const mrl_message *)lua_touserdata(L, -1))->body_len;
  if (MR_UNLIKELY(q->full) && has_room(q)) mrl_queue_unfill(q);
  return 1;
}

static int queue_count(lua_State *L) {
  lua_pushinteger(L, check_queue(L)->count);
  return 1;
}

/* For a consumer that is not wanted any more: what waits goes back to the broker (if it is to be
 * settled at all), and so will what still comes. */
static int queue_discard(lua_State *L) {
  mrl_queue *q = check_queue(L);
  lua_settop(L, 1);
  mr_get_uservalue(L, 1);
  for (; q->count > 0; q->count--) {
    lua_rawgeti(L, 2, MR_RING_FIRST + (int)q->head);
    mrl_message_return(lua_touserdata(L, -1));
    lua_pop(L, 1);
    lua_pushnil(L);
    lua_rawseti(L, 2, MR_RING_FIRST + (int)q->head);
    q->head = (q->head + 1) & (q->capacity - 1);
  }
  q->bytes = 0;
  mrl_queue_unfill(q);
  q->discarding = true;
  return 0;
}

const luaL_Reg mrl_queue_functions[] = {
    {"pop", queue_pop}, {"count", queue_count}, {"discard", queue_discard}, {NULL, NULL}};
