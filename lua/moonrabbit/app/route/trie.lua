--- AMQP topic patterns, many at once: which is the first of them that a routing key matches.
--
-- The patterns stand in a trie over their words. A key walks through it with the set of nodes that it may
-- be at: for each word the child of that name, the child `*`, and every node `#` once it was reached. So a
-- look-up costs what the key is long, not how many patterns there are, and it cannot explode: a node is in
-- the set once. Runs of wildcards are put in one order (`*` before `#`), which makes equal patterns equal.
--
-- As in RabbitMQ, an empty key has no words, and "a..b" has an empty one.
-- @module moonrabbit.app.route.trie

local find, sub = string.find, string.sub

---@class moonrabbit.app.Trie
---@field known table<string, integer|false>  the answers of first(key, 0) that are remembered
local Trie = {}
Trie.__index = Trie

--- Keys whose answer is remembered; past that all are forgotten.
local REMEMBERED = 4096

local function split(text, words)
  local n, from = 0, 1
  if text ~= "" then
    repeat
      local dot = find(text, ".", from, true)
      n = n + 1
      words[n] = sub(text, from, dot and dot - 1)
      from = dot and dot + 1
    until not dot
  end
  for i = n + 1, #words do words[i] = nil end
  return n
end

-- "#.*.#" matches what "*.#" does.
local function normal(words)
  local out, stars, hash = {}, 0, false
  local function close()
    for _ = 1, stars do out[#out + 1] = "*" end
    if hash then out[#out + 1] = "#" end
    stars, hash = 0, false
  end
  for _, word in ipairs(words) do
    if word == "*" then
      stars = stars + 1
    elseif word == "#" then
      hash = true
    else
      close()
      out[#out + 1] = word
    end
  end
  close()
  return out
end

local function node(is_hash)
  return { words = {}, star = false, hash = false, is_hash = is_hash or false, rules = false, stamp = 0 }
end

---@return moonrabbit.app.Trie
function Trie.new()
  return setmetatable({
    root = node(), stamp = 0, here = {}, there = {}, words = {}, known = {}, knows = 0,
  }, Trie)
end

--- Adds a pattern. Rules are added with growing numbers.
---@param pattern string
---@param rule integer from 1
function Trie:add(pattern, rule)
  local words = {}
  split(pattern, words)
  local at = self.root
  for _, word in ipairs(normal(words)) do
    if word == "*" then
      at.star = at.star or node()
      at = at.star
    elseif word == "#" then
      at.hash = at.hash or node(true)
      at = at.hash
    else
      at.words[word] = at.words[word] or node()
      at = at.words[word]
    end
  end
  at.rules = at.rules or {}
  at.rules[#at.rules + 1] = rule
  self.known, self.knows = {}, 0
end

-- Adds a node, and the `#` that may stand for no word, to a set of n nodes.
local function enter(set, n, at, stamp)
  repeat
    if at.stamp == stamp then return n end
    at.stamp = stamp
    n = n + 1
    set[n] = at
    at = at.hash
  until not at
  return n
end

-- The nodes that a key ends at: a set and how many.
local function walk(self, key)
  local words, here, there = self.words, self.here, self.there
  local count = split(key, words)
  local stamp = self.stamp + 1
  local n = enter(here, 0, self.root, stamp)
  for i = 1, count do
    local word, m = words[i], 0
    stamp = stamp + 1
    for j = 1, n do
      local at = here[j]
      if at.is_hash then m = enter(there, m, at, stamp) end
      local child = at.words[word]
      if child then m = enter(there, m, child, stamp) end
      if at.star then m = enter(there, m, at.star, stamp) end
    end
    here, there, n = there, here, m
    if n == 0 then break end
  end
  self.stamp = stamp
  return here, n
end

local function lowest(self, key, after)
  local best
  local ends, n = walk(self, key)
  for i = 1, n do
    local rules = ends[i].rules
    for j = 1, rules and #rules or 0 do
      local rule = rules[j]
      if rule > after then
        if not best or rule < best then best = rule end
        break
      end
    end
  end
  return best or false
end

--- The first rule after `after` whose pattern matches the key, or false.
---@param key string
---@param after integer 0: the first of all
---@return integer|false
function Trie:first(key, after)
  if after > 0 then return lowest(self, key, after) end
  local rule = self.known[key]
  if rule ~= nil then return rule end
  rule = lowest(self, key, 0)
  if self.knows == REMEMBERED then self.known, self.knows = {}, 0 end
  self.known[key] = rule
  self.knows = self.knows + 1
  return rule
end

--- Every rule whose pattern matches the key, in order.
---@param key string
---@return integer[]
function Trie:every(key)
  local all = {}
  local ends, n = walk(self, key)
  for i = 1, n do
    local rules = ends[i].rules
    for j = 1, rules and #rules or 0 do all[#all + 1] = rules[j] end
  end
  table.sort(all)
  return all
end

return Trie
