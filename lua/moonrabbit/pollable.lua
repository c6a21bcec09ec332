--- What makes connections, consumers and confirmations objects that `cqueues.poll` takes, beside sockets, conditions,
--- controllers and timeouts, in any cqueue:
--
--     local ready = cqueues.poll(consumer, socket, 5)
--     if ready == consumer then message = consumer:receive(0) end
--
-- cqueues asks such an object for `pollfd` (here one of its conditions, which is signalled when there is something to
-- look at), `events` (for descriptors: none) and `timeout` (0: there is already). It takes nothing: whoever is told
-- looks, without waiting, and may find that another task was quicker.
--
-- * A consumer without a handler is ready while a message is there to take, and once it has ended.
-- * A confirmation is ready once it is settled.
-- * A connection is ready when its state has changed, or the broker has blocked or unblocked publishing, since it was
--   last asked; while there is a message in one of its consumers that have no handler and on which no task waits in
--   `receive` or `messages`; and once it is closed. Let one task poll it: what has changed is told once.
-- @module moonrabbit.pollable

local core = require "moonrabbit.core"

local core_acked, core_owner = core.acked, core.owner

---@class moonrabbit.Pollable
---@field pollfd fun(self): userdata?   a cqueues.condition, nil when it is ready; throws with other runtimes
---@field events fun(self): nil
---@field timeout fun(self): number?    0 when it is ready

local pollable = {}

-- The condition of cqueues that rings with one of the runtime's.
local function bell_of(runtime, condition, what)
  if not runtime.bell then
    error(("%s:pollfd: cqueues can wait for it only with the runtime 'cqueues', and this is '%s'"):format(what,
      runtime.name), 3)
  end
  return runtime.bell(condition)
end

local function no_events() return nil end

-- ---- Consumers --------------------------------------------------------------------------------------

local Consumer = {}

local function consumer_is_ready(self) return self._ended ~= nil or self:buffered() > 0 end

---@package
function Consumer:pollfd()
  if self._handler then error("Consumer:pollfd: this consumer has a handler, which takes the messages", 2) end
  local bell = bell_of(self._runtime, self._ready, "Consumer")
  if consumer_is_ready(self) then return nil end
  self._session:drain()
  return bell
end

---@package
function Consumer:timeout() return consumer_is_ready(self) and 0 or nil end

-- ---- Confirmations ----------------------------------------------------------------------------------

local Confirmation = {}

--- Who knows about a confirmation: the channel, or the publisher that may have sent it on several.
---@package
function pollable.keeper_of(confirmation)
  local owner = core_owner(confirmation)
  return owner._publisher or owner
end

local keeper_of = pollable.keeper_of

local function is_settled(confirmation)
  return core_acked(confirmation) ~= false or keeper_of(confirmation)._closed ~= nil
end

---@package
function Confirmation:pollfd()
  if is_settled(self) then return nil end
  local keeper = keeper_of(self)
  local condition, runtime = keeper:_condition_of(self)
  condition.home = keeper._room.home -- cqueues asks from wherever it runs
  return bell_of(runtime, condition, "Confirmation")
end

---@package
function Confirmation:timeout() return is_settled(self) and 0 or nil end

-- ---- Connections ------------------------------------------------------------------------------------

local Connection = {}

--- Something happened that whoever polls is told, now or when they ask next.
---@package
function Connection:_ring()
  local news = self._news
  if not news or news:broadcast() == 0 then self._unheard = true end
end

--- A message came for a consumer that nobody waits on. It is found as long as it is there.
---@package
function Connection:_ring_for(consumer)
  if self._news and not consumer._waited_on then self._news:broadcast() end
end

local function has_message(self)
  for channel in pairs(self._session.channels) do
    for _, consumer in pairs(channel._consumers) do
      if not consumer._handler and not consumer._waited_on and consumer:buffered() > 0 then return true end
    end
  end
  return false
end

---@package
function Connection:pollfd()
  self._news = self._news or self._runtime.condition()
  local bell = bell_of(self._runtime, self._news, "Connection")
  self._session:drain()
  return bell
end

---@package
function Connection:timeout()
  if self._state == "closed" then return 0 end
  local unheard = self._unheard
  self._unheard = false
  return (unheard or has_message(self)) and 0 or nil
end

-- ---- The classes ------------------------------------------------------------------------------------

local mixins = { Consumer = Consumer, Confirmation = Confirmation, Connection = Connection }

--- Adds the methods to a class.
---@package
---@param class table
---@param what "Consumer"|"Confirmation"|"Connection"
function pollable.extend(class, what)
  for name, method in pairs(mixins[what]) do class[name] = method end
  class.events = no_events
end

return pollable
