--- The events of a connection: who listens, and the task that calls them.
-- @module moonrabbit.connection

local options = require "moonrabbit.options"
local pcall = require "moonrabbit.protect"

local argument = options.argument

---@class moonrabbit.Connection
local Connection = {}

local events = {
  open = true, closed = true, state = true, blocked = true, unblocked = true, ["return"] = true, error = true,
  recovering = true, recovered = true, recovery_error = true, consumer_recovered = true, queue_renamed = true,
  suspect = true, cluster = true, site = true, held = true, released = true,
}

--- Calls `fn` on an event. The calls come one after the other, in a task of their own:
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
    count = count + 1
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
        self._log("error", "an event listener threw: " .. tostring(err))
      end
    until ok
    self._delivering = nil
  end)
end

--- Queues calls of listeners; never yields.
---@package
function Connection:_dispatch(list, ...)
  local n = select("#", ...)
  for i = 1, #list do
    self._last = self._last + 1
    self._events[self._last] = { list[i], n = n + 1, ... }
  end
  if not self._delivering then
    self._delivering = true
    dispatcher(self)
  end
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

local mixin = {}

--- Adds the methods to the class.
---@package
function mixin.extend(class)
  for name, method in pairs(Connection) do class[name] = method end
end

return mixin
