--- Routes that send messages round in a circle, as far as that is certain from an app alone: what is sent on unchanged
-- comes back to the queue it was taken from, at once or by way of other consumers that send everything on.
-- @module moonrabbit.app.cycles

local route = require "moonrabbit.app.route"
local Trie = require "moonrabbit.app.route.trie"

local unpack = rawget(table, "unpack") or rawget(_G, "unpack")

local cycles = {}

local function matches(exchange, bind, key)
  local kind = exchange.type or "topic"
  if kind == "fanout" then return true end
  if kind == "direct" then return bind[2] == key end
  if kind ~= "topic" then return false end
  if bind[2] == "#" then return true end
  if not key then return false end
  local trie = Trie.new()
  trie:add(bind[2] or "", 1)
  return trie:first(key, 0) == 1
end

--- Whether what a route sends is certain to reach a queue, unchanged.
---@param spec table  the app's
---@param send table  a node of route.forward or route.publish
---@param queue string
---@return boolean
function cycles.reaches(spec, send, queue)
  if send.make or send.opts.set or send.opts.remove then return false end
  if send.exchange == "" then return send.key == queue end
  local exchange = (spec.exchanges or {})[send.exchange]
  if not exchange then return false end
  for _, bind in ipairs(spec.queues[queue].bind or {}) do
    if bind[1] == send.exchange and matches(exchange, bind, send.key) then return true end
  end
  return false
end

-- What a consumer sends on whatever the message: its route itself, or those of a list.
local function always_sent(target, found)
  if getmetatable(target) == route.Route then
    if target.exchange then found[#found + 1] = target end
  elseif type(target) == "table" then
    for i = 1, #target do always_sent(target[i], found) end
  end
  return found
end

-- The queues that everything in a consumer's queue goes on to, as a set.
local function next_queues(spec, consumer)
  local queues = {}
  for _, send in ipairs(always_sent(consumer.route, {})) do
    for _, other in ipairs(spec.consumers) do
      if cycles.reaches(spec, send, other.queue) then queues[other.queue] = true end
    end
  end
  return queues
end

--- The queues of consumers that send everything round and round, in order; nil where there are none.
---@param spec table the app's, whose consumers have been checked
---@return string[]|nil
function cycles.find(spec)
  local after = {}
  for _, consumer in ipairs(spec.consumers) do
    after[consumer.queue] = after[consumer.queue] or next_queues(spec, consumer)
  end
  local done = {}
  local function walk(queue, path)
    for i, name in ipairs(path) do
      if name == queue then return { unpack(path, i) } end
    end
    if done[queue] then return nil end
    path[#path + 1] = queue
    for following in pairs(after[queue] or {}) do
      local found = walk(following, path)
      if found then return found end
    end
    path[#path], done[queue] = nil, true
  end
  for _, consumer in ipairs(spec.consumers) do
    local found = walk(consumer.queue, {})
    if found then return found end
  end
end

return cycles
