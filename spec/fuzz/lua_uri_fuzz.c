/* Any text as a URI: a parsed result that makes sense, or a problem that does not quote a password. A
   problem that holds a piece of the text by chance ("parameter") says the same of another password of the same shape. */
#include <lauxlib.h>
#include <lualib.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static lua_State *L;

/* libFuzzer sees no lines of Lua by itself: each step from line to line counts as an edge. */
enum { EDGES = 1 << 14 };
__attribute__((section("__libfuzzer_extra_counters"))) static uint8_t edges[EDGES];

static void count_line(lua_State *state, lua_Debug *at) {
  static unsigned last;
  lua_getinfo(state, "l", at);
  unsigned line = (unsigned)at->currentline;
  edges[(last * 31 + line) % EDGES]++;
  last = line;
}

/* Runs from the top of the checkout, as scripts/fuzz does. */
static const char SETUP[] =
    "package.path = './lua/?.lua;./lua/?/init.lua;' .. package.path\n"
    "local uri = require 'moonrabbit.uri'\n"
    "return function(text)\n"
    "  local parsed, problem = uri.parse(text)\n"
    "  if not parsed then\n"
    "    assert(type(problem) == 'string' and #problem > 0)\n"
    "    local before, secret, after = text:match '^(.-://[^@/:?#]*:)([^@/?#]+)(@.*)$'\n"
    "    if secret and #secret > 7 and problem:find(secret, 1, true) then\n"
    "      local letters = secret:gsub('[g-zG-Z]', function(c) return c == 'z' and 'y' or 'z' "
    "end)\n"
    "      local _, other = uri.parse(before .. letters .. after)\n"
    "      assert(other == problem, 'the password is quoted')\n"
    "    end\n"
    "    return\n"
    "  end\n"
    "  assert(type(parsed.vhost) == 'string' and #parsed.vhost <= 255)\n"
    "  if parsed.srv then\n"
    "    assert(parsed.srv:find '^_.' and not parsed.port)\n"
    "  elseif not parsed.path then\n"
    "    assert(#parsed.host > 0)\n"
    "    assert(parsed.port >= 1 and parsed.port <= 65535 and parsed.port % 1 == 0)\n"
    "  end\n"
    "  local redacted = uri.redacted(parsed)\n"
    "  local again = assert(uri.parse(redacted), redacted)\n"
    "  assert(again.vhost == parsed.vhost and again.path == parsed.path and again.srv == "
    "parsed.srv)\n"
    "  assert(parsed.srv or again.host == parsed.host)\n"
    "end";

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc;
  (void)argv;
  L = luaL_newstate();
  luaL_openlibs(L);
  if (luaL_dostring(L, SETUP)) {
    fprintf(stderr, "%s\n", lua_tostring(L, -1));
    abort();
  }
  lua_sethook(L, count_line, LUA_MASKLINE, 0);
  return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  lua_pushvalue(L, 1);
  lua_pushlstring(L, (const char *)data, size);
  if (lua_pcall(L, 1, 0, 0)) {
    fprintf(stderr, "%s\n", lua_tostring(L, -1));
    abort();
  }
  return 0;
}
