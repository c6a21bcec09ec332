--- The events of a connection: who listens, and the task that calls them.
-- @module moonrabbit.connection

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"
local described = require "moonrabbit.described"
local pcall = require "moonrabbit.protect"

local argument = options.argument

-- Calls of listeners that may wait, and bytes of the bodies of messages among them: past that nothing is read.
local MOST_WAITING, MOST_BYTES = 4096, 16 * 1024 * 1024

---@class moonrabbit.Connection
local Connection = {}

local events = {
  open = true, closed = true, state = true, blocked = true, unblocked = true, ["return"] = true, error = true,
  recovering = true, recovered = true, recovery_error = true, consumer_recovered = true, queue_renamed = true,
  suspect = true, cluster = true, site = true, held = true, released = true,
}

--- Calls `fn` on an event. The calls come one after the other, in a task of their own. A broker that brings more
--- than they take is held back: past 4,096 waiting calls, or 16 MiB of returned messages, the connection reads only
--- what brings an answer that somebody waits for.
---
--- * "state" (state, err): "open", "recovering", "closing", "closed"; err: why
--- * "open" (): also when it has come back; "closed" (err): for good
--- * "recovering" (err, attempt, delay): it was lost, or an attempt failed; the next one follows in `delay` seconds
--- * "recovered" (): it has come back, and all that could be restored is there
--- * "recovery_error" (entity, err): what could not be restored: entity.kind is "exchange", "queue",
---   "exchange_binding", "queue_binding", "channel" or "consumer". It is tried again
--- * "consumer_recovered" (consumer, why): it consumes again; why: what had ended it
--- * "queue_renamed" (old, new): a queue that the broker names came back under another name
--- * "suspect" (strategy, details): the broker's silence is going to end the connection (moonrabbit.health)
--- * "cluster" (what, details): mode "smart"; what: "node_found", "node_gone", "leader_moved", "quarantined", or
---   "unknown": what could not be learned
--- * "site" (name, before): the connection is now to the "primary" or the "standby" site
--- * "held" (why): publishing is held there; "released" (name): it is open
--- * "blocked" (reason), "unblocked" (): https://www.rabbitmq.com/docs/connection-blocked
--- * "return" (message, channel): an unroutable publish came back
--- * "error" (text, message): a handler threw; with no listener it is logged
---@param event string
---@param fn function   it may wait; what it throws is logged
---@return function off takes `fn` off again
function Connection:on(event, fn)
  if not events[event] then
    local hint = type(event) == "string" and options.nearest(event, events)
    error("Connection:on: there is no event '" .. tostring(event) .. "'"
      .. (hint and " (did you mean '" .. hint .. "'?)" or ""), 2)
  end
  argument("Connection:on", "fn", fn, options.callback)
  local list = self._listeners[event] or {}
  self._listeners[event] = list
  list[#list + 1] = fn
  return function()
    for i = #list, 1, -1 do
      if list[i] == fn then table.remove(list, i) end
    end
  end
end

local unpack = table.unpack or unpack -- luacheck: ignore 143 113

-- Runs queued functions in their order, in one task that ends when there are none.
local function deliver_events(self)
  local queue, count = self._events, 0
  while self._first <= self._last do
    local item = queue[self._first]
    queue[self._first] = nil
    self._first = self._first + 1
    self._event_bytes = self._event_bytes - item.bytes
    count = count + 1
    if self._session and not self:_overfull() then self._session:drain() end
    if count % 64 == 0 then self._runtime.sleep(0) end
    item[1](unpack(item, 2, item.n))
  end
  self._first, self._last = 1, 0
end

local function dispatcher(self)
  self._runtime.spawn(function()
    -- What throws must not keep the later events from being delivered.
    repeat
      local ok, err = pcall(deliver_events, self)
      if not ok then
        if err == self._runtime.cancelled and err ~= nil then break end
        self._log("error", "an event listener threw: " .. described(err))
      end
    until ok
    self._delivering = nil
    -- Where the listener's task was cancelled, the others are called all the same.
    if self._first <= self._last then dispatcher(self) end
  end)
  self._delivering = true
end

--- Whether so many calls of listeners wait that nothing more is to be read.
---@package
function Connection:_overfull()
  return self._last - self._first >= MOST_WAITING or self._event_bytes > MOST_BYTES
end

--- Queues calls of listeners; never yields.
---@package
function Connection:_dispatch(list, ...)
  local n, first = select("#", ...), (...)
  local bytes = core.is_message(first) and #first.body or 0
  for i = 1, #list do
    self._last = self._last + 1
    self._event_bytes = self._event_bytes + bytes
    self._events[self._last] = { list[i], n = n + 1, bytes = bytes, ... }
  end
  if not self._delivering then dispatcher(self) end
end

---@package
function Connection:_event(event, ...)
  local list = self._listeners[event]
  if list and #list > 0 then self:_dispatch(list, ...) end
end

--- Reports what nobody waits for.
---@package
function Connection:_report(event, text, message)
  local list = self._listeners[event]
  if list and #list > 0 then
    self:_dispatch(list, text, message)
  else
    self._log("error", text)
  end
end

return Connection
