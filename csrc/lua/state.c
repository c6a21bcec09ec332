/* Memory that the binding reuses: one arena, one pool and one buffer for each Lua state. */
#include <stdlib.h>

#include "lua/binding.h"

enum { CHUNK_SIZE = 8192, ARENA_KEEP = 1 << 20, POOL_PAGE = 4096, SCRATCH_KEEP = 1 << 20 };

struct mrl_chunk {
  mrl_chunk *next;
  size_t size;
  max_align_t data[];
};

/* ---- arena ---- */

static void free_chunks(mrl_chunk *chunk) {
  while (chunk) {
    mrl_chunk *next = chunk->next;
    free(chunk);
    chunk = next;
  }
}

void mrl_arena_reset(mrl_arena *arena) {
  size_t kept = 0;
  if (arena->current != arena->first) {
    for (mrl_chunk *c = arena->first; c; c = c->next) {
      kept += c->size;
      if (kept <= ARENA_KEEP) continue;
      free_chunks(c->next);
      c->next = NULL;
    }
  }
  arena->current = arena->first;
  arena->used = 0;
}

static bool arena_advance(mrl_arena *arena, size_t size) {
  mrl_chunk *next = arena->current ? arena->current->next : NULL;
  if (!next || next->size < size) {
    size_t room = size > CHUNK_SIZE ? size : CHUNK_SIZE;
    mrl_chunk *made = malloc(sizeof *made + room);
    if (!made) return false;
    made->size = room;
    made->next = next;
    if (arena->current)
      arena->current->next = made;
    else
      arena->first = made;
    next = made;
  }
  arena->current = next;
  arena->used = 0;
  return true;
}

void *mrl_arena_alloc(lua_State *L, mrl_arena *arena, size_t size) {
  size = (size + sizeof(max_align_t) - 1) & ~(sizeof(max_align_t) - 1);
  if (!arena->current || arena->current->size - arena->used < size) {
    if (!arena_advance(arena, size)) luaL_error(L, "not enough memory");
  }
  char *p = (char *)arena->current->data + arena->used;
  arena->used += size;
  return p;
}

/* ---- scratch ---- */

uint8_t *mrl_scratch(mrl_state *st, size_t size) {
  bool wasteful = st->scratch_size > SCRATCH_KEEP && size <= SCRATCH_KEEP;
  if (st->scratch_size >= size && !wasteful) return st->scratch;
  uint8_t *grown = realloc(st->scratch, size);
  if (!grown) return NULL;
  st->scratch = grown;
  st->scratch_size = size;
  return grown;
}

/* ---- pools ---- */

static int pool_gc(lua_State *L) {
  amqp_pool_t *pool = lua_touserdata(L, 1);
  empty_amqp_pool(pool);
  init_amqp_pool(pool, POOL_PAGE);
  return 0;
}

/* A decode that was left by an error, or that runs in a finalizer inside another decode, leaves the
 * state's own pool alone and gets one that Lua owns. */
amqp_pool_t *mrl_pool_acquire(lua_State *L, mrl_state *st) {
  if (!st->pool_busy) {
    lua_pushnil(L);
    st->pool_busy = true;
    return &st->pool;
  }
  amqp_pool_t *pool = lua_newuserdata(L, sizeof *pool);
  init_amqp_pool(pool, POOL_PAGE);
  lua_createtable(L, 0, 1);
  lua_pushcfunction(L, pool_gc);
  lua_setfield(L, -2, "__gc");
  lua_setmetatable(L, -2);
  return pool;
}

void mrl_pool_release(mrl_state *st, amqp_pool_t *pool) {
  if (pool != &st->pool) {
    empty_amqp_pool(pool);
    init_amqp_pool(pool, POOL_PAGE);
    return;
  }
  recycle_amqp_pool(pool);
  st->pool_busy = false;
}

/* ---- the state ---- */

static int state_gc(lua_State *L) {
  mrl_state *st = lua_touserdata(L, 1);
  free_chunks(st->arena.first);
  memset(&st->arena, 0, sizeof st->arena);
  free(st->scratch);
  st->scratch = NULL;
  st->scratch_size = 0;
  empty_amqp_pool(&st->pool);
  init_amqp_pool(&st->pool, POOL_PAGE);
  return 0;
}

mrl_state *mrl_state_new(lua_State *L) {
  mrl_state *st = mr_new_userdata(L, sizeof *st);
  memset(st, 0, sizeof *st);
  init_amqp_pool(&st->pool, POOL_PAGE);
  lua_createtable(L, 0, 1);
  lua_pushcfunction(L, state_gc);
  lua_setfield(L, -2, "__gc");
  lua_setmetatable(L, -2);
  lua_createtable(L, MR_MAX_KEYS, 0);
  mr_set_uservalue(L, -2);
  return st;
}

void mrl_intern(lua_State *L, mrl_state *st, int keys_table, int place, const char *name) {
  lua_pushstring(L, name);
  st->keys[place] = lua_tostring(L, -1);
  lua_rawseti(L, keys_table, place + 1);
}

/* Short strings are interned by every Lua, so the pointers nearly always decide. */
int mrl_find_key(const mrl_state *st, const char *name, int from, const char *const *names, int n) {
  for (int i = 0; i < n; i++)
    if (st->keys[from + i] == name) return i;
  for (int i = 0; i < n; i++)
    if (strcmp(names[i], name) == 0) return i;
  return -1;
}
