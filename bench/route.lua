-- What routing costs by how many key patterns there are: nanoseconds for one message, its key seen before and
-- not, and of a list that is gone through.
--   lua5.4 bench/route.lua        (no broker)
dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")

local Trie = require "moonrabbit.app.route.trie"
local compile = require "moonrabbit.app.route.compile"
local route = require "moonrabbit.app.route"

local function time(n, fn)
  local best = math.huge
  for _ = 1, 5 do
    collectgarbage()
    local start = os.clock()
    for i = 1, n do fn(i) end
    best = math.min(best, os.clock() - start)
  end
  return best / n * 1e9
end

-- Patterns with and without wildcards, and keys of which half match late, half early.
local function pattern(i)
  local kind = i % 4
  if kind == 0 then return ("order.region%d.*.created"):format(i) end
  if kind == 1 then return ("order.region%d.#"):format(i) end
  if kind == 2 then return ("*.region%d.shop.paid"):format(i) end
  return ("#.audit%d"):format(i)
end

print((rawget(_G, "jit") and jit.version or _VERSION) .. ", ns a message") -- luacheck: ignore
print "patterns   known key   new key   list"
for _, n in ipairs { 10, 100, 1000, 10000 } do
  local trie, rules, handlers = Trie.new(), {}, {}
  for i = 1, n do
    trie:add(pattern(i), i)
    handlers[i] = function() end
    rules[i] = route.key(pattern(i), handlers[i])
  end
  local compiled = assert(compile.compile(route.first(rules)))
  local keys, messages = {}, {}
  for i = 1, 1000 do
    keys[i] = ("order.region%d.shop.created"):format((i * 7919) % n + 1)
    messages[i] = { routing_key = keys[i] }
  end
  local known = time(200000, function(i) return compiled.resolve(messages[i % 1000 + 1]) end)
  local new = time(100000, function(i)
    trie.known, trie.knows = {}, 0
    return trie:first(keys[i % 1000 + 1], 0)
  end)
  -- What one trie a pattern would do, in order: the cost of asking one after the other.
  local single = {}
  for i = 1, n do
    single[i] = Trie.new()
    single[i]:add(pattern(i), 1)
  end
  local list = time(math.max(20, math.floor(200000 / n / 10)), function(i)
    local key = keys[i % 1000 + 1]
    for j = 1, n do
      single[j].known, single[j].knows = {}, 0
      if single[j]:first(key, 0) then return j end
    end
  end)
  print(("%8d %11.0f %9.0f %9.0f"):format(n, known, new, list))
end
