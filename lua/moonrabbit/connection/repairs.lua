--- What could not be restored, or was lost while the connection went on: tried again, each with a backoff of
-- its own, by one task.
--
-- * an exchange, queue or binding that the broker refused;
-- * a channel that the broker closed, with consumers or a publisher on it;
-- * a consumer that the broker cancelled, or whose queue is not there.
--
-- When the connection is lost, all of it is forgotten here: the recovery begins anew.
-- @module moonrabbit.connection.repairs

local Backoff = require "moonrabbit.connection.backoff"
local Record = require "moonrabbit.connection.record"
local protect = require "moonrabbit.protect"

local Repairs = {}
Repairs.__index = Repairs

function Repairs.new(connection)
  return setmetatable({
    connection = connection,
    items = {},                                       -- object -> { kind, object, due, err }
    memory = setmetatable({}, { __mode = "k" }),      -- object -> { backoff, since }
    wake = connection._runtime.condition(),
  }, Repairs)
end

local function give_up(self, kind, object, err)
  self.connection._log("warn", "given up: " .. Record.label(object))
  if kind == "consumer" then object:_give_up(err) elseif kind == "channel" then object:_ended(err) end
end

local run

--- Puts something down. kind: "entity", "channel" or "consumer".
function Repairs:add(kind, object, err)
  local connection = self.connection
  if self.items[object] or not connection._policy then return end
  local now = connection._runtime.now()
  local memory = self.memory[object]
  if not memory then
    memory = { backoff = Backoff.new(connection._policy) }
    self.memory[object] = memory
  elseif memory.since then
    memory.backoff:lasted(now - memory.since)
    memory.since = nil
  end
  local delay = memory.backoff:next()
  if not delay then return give_up(self, kind, object, err) end
  self.items[object] = { kind = kind, object = object, due = now + delay, err = err }
  if self.running then
    self.wake:signal()
  else
    connection._runtime.spawn(run, self)
    self.running = true
  end
end

--- It is well again.
function Repairs:done(object)
  local memory = self.memory[object]
  if memory and not memory.since then memory.since = self.connection._runtime.now() end
  self.items[object] = nil
end

--- The connection was lost, or is closed.
function Repairs:stop()
  self.items = {}
  self.wake:signal()
end

-- Takes what is due, by kind; else how long there is nothing to do.
local function due(self, now)
  local entities, channels, consumers, soonest = {}, {}, {}, nil
  local lists = { entity = entities, channel = channels, consumer = consumers }
  for object, item in pairs(self.items) do
    if item.due <= now then
      self.items[object] = nil
      table.insert(lists[item.kind], object)
    elseif not soonest or item.due < soonest then
      soonest = item.due
    end
  end
  if #entities + #channels + #consumers > 0 then
    table.sort(entities, Record.before)
    return { entities = entities, channels = channels, consumers = consumers }
  end
  return nil, soonest and soonest - now
end

-- The queues of consumers, with all by which messages reach them.
local function around(self, consumers, entities)
  local record, known = self.connection._record, {}
  if not record then return end
  for _, entity in ipairs(entities) do known[entity] = true end
  for _, consumer in ipairs(consumers) do
    for _, entity in ipairs(record:around(consumer.queue)) do
      if not known[entity] then
        known[entity] = true
        entities[#entities + 1] = entity
      end
    end
  end
  table.sort(entities, Record.before)
end

local function repair(self, what)
  local connection = self.connection
  local session = connection._session
  local recovery = require "moonrabbit.connection.recovery"
  local consumers = what.consumers
  around(self, consumers, what.entities)
  if #what.entities > 0 and not recovery.declare(connection, session, what.entities) then return end
  if #what.channels > 0 then
    local opened = recovery.open_channels(connection, session, what.channels)
    if not opened then return end
    for _, channel in ipairs(opened) do recovery.resume(connection, channel) end
    local known = {}
    for _, consumer in ipairs(consumers) do known[consumer] = true end
    for _, consumer in ipairs(recovery.consumers_of(opened)) do
      if not self.items[consumer] and not known[consumer] then consumers[#consumers + 1] = consumer end
    end
  end
  if #consumers > 0 then recovery.consume(connection, session, consumers) end
end

-- What was taken and is not mended by now (the broker did not answer, say) is put down again.
local function put_back(self, what)
  local connection = self.connection
  if connection._state ~= "open" then return end
  for _, entity in ipairs(what.entities) do
    if (entity.failure or entity.waits) and not entity.gone and not entity.out then
      self:add("entity", entity, entity.failure)
    end
  end
  for _, channel in ipairs(what.channels) do
    if channel._closed and not channel._over then self:add("channel", channel, channel._closed) end
  end
  for _, consumer in ipairs(what.consumers) do
    if consumer._down and not consumer._ended and not consumer.channel._closed then
      self:add("consumer", consumer, consumer._down)
    end
  end
end

local function turns(self)
  local connection = self.connection
  local now = connection._runtime.now
  while next(self.items) do
    local state = connection._state
    if state == "open" then
      local what, wait = due(self, now())
      if what then
        self.taken = what
        repair(self, what)
        self.taken = nil
        put_back(self, what)
      else
        self.wake:wait(wait)
      end
    elseif state == "recovering" then
      connection._changed:wait()
    else
      self.items = {}
    end
  end
end

-- What it was about when something threw is tried again like the rest.
function run(self)
  local connection = self.connection
  local whole, err
  repeat
    whole, err = protect(turns, self)
    if not whole then
      if err ~= nil and err == connection._runtime.cancelled then break end
      connection._log("error", "restoring threw: " .. tostring(err))
      local taken = self.taken
      self.taken = nil
      if taken then put_back(self, taken) end
    end
  until whole
  self.running = false
end

return Repairs
