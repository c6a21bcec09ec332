--- Restores what a connection had: exchanges, queues, bindings, channels, consumers.
--
-- `run` does it all on a new session. What the broker refuses is reported ("recovery_error") and left to
-- moonrabbit.connection.repairs, which tries again with a backoff; the rest goes on. A session that ends
-- meanwhile ends the recovery, which starts over as a whole on the next one.
-- @module moonrabbit.connection.recovery

local errors = require "moonrabbit.errors"
local protect = require "moonrabbit.protect"
local Record = require "moonrabbit.connection.record"
local pipeline = require "moonrabbit.connection.pipeline"

local recovery = {}

--- What calls are told until what they are for is back.
---@param err moonrabbit.Error
---@param text string
---@return moonrabbit.Error
function recovery.meanwhile(err, text)
  return errors.new {
    kind = "closed", message = text .. ": " .. err.message, temporary = true, code = err.code, class = err.class,
    method = err.method, endpoint = err.endpoint,
  }
end

-- Whether the user wants an entity back.
local function wanted(self, kind, entity)
  local filter = self._recover.filter
  if not filter then return true end
  local whole, answer = protect(filter, kind, entity)
  if whole then return answer ~= false end
  self._log("error", "the option 'recover.filter' threw: " .. tostring(answer))
  return true
end

-- Says that something could not be restored, once for each reason.
local function report(self, entity, err)
  if entity._reported == err.message then return end
  entity._reported = err.message
  self._log("warn", ("not restored: %s: %s"):format(Record.label(entity), tostring(err)))
  self:_event("recovery_error", entity, err)
end

-- ---- Exchanges, queues, bindings --------------------------------------------------------------------

-- A queue or exchange that could not be declared; one of other properties (406) is there all the same.
local function is_missing(entity) return entity ~= nil and entity.failure ~= nil and entity.failure.code ~= 406 end

local function lacks_its_ends(record, entity)
  if is_missing(record.exchanges[entity.source]) then return true end
  local ends = entity.kind == "queue_binding" and record.queues or record.exchanges
  return is_missing(ends[entity.destination])
end

local function refused(self, entity, err)
  entity.failure = err
  report(self, entity, err)
  self._repairs:add("entity", entity, err)
end

local function restored(self, entity)
  if entity.failure then self._log("info", "restored: " .. Record.label(entity)) end
  entity.failure, entity.waits, entity._reported = nil, nil, nil
  self._repairs:done(entity)
end

local function renamed(self, old, new)
  self._record:renamed(old, new)
  for channel in pairs(self._channels) do channel:_queue_renamed(old, new) end
  self:_event("queue_renamed", old, new)
end

local function declaration(self, session, entity)
  local step = {}
  step.method, step.fields = Record.declaration(entity)
  function step.done(reply)
    if entity.server_named and reply.queue ~= entity.name then renamed(self, entity.name, reply.queue) end
    restored(self, entity)
  end
  function step.failed(err) refused(self, entity, err) end
  function step.ended(err)
    entity.out = true
    report(self, entity, err)
  end
  -- Under its name it may still be there: on the same connection, and one that is not exclusive also on the next.
  -- Only where it is not, the broker gives another one.
  if entity.server_named and (not entity.exclusive or session == self._session) then
    return {
      method = "queue.declare", fields = { queue = entity.name, passive = true }, ended = step.ended,
      done = function() restored(self, entity) end,
      failed = function(err)
        if err.code == 404 or entity.exclusive and err.code == 405 then return step end -- 405: of the last connection
        refused(self, entity, err)
      end,
    }
  end
  return step
end

local function is_binding(entity) return entity.kind == "queue_binding" or entity.kind == "exchange_binding" end

-- Declares some of them: the bindings, or all but these.
local function declare_some(self, session, entities, bindings)
  local steps = {}
  for _, entity in ipairs(entities) do
    if is_binding(entity) == bindings and not entity.out and not entity.gone and wanted(self, entity.kind, entity) then
      if bindings and lacks_its_ends(self._record, entity) then
        entity.waits = true
        self._repairs:add("entity", entity, nil)
      else
        steps[#steps + 1] = declaration(self, session, entity)
      end
    end
  end
  return pipeline.run(self, session, steps, self.call_timeout)
end

--- Declares entities of the record, in their order. nil, err: the session has ended, or does not answer.
---@param entities table[]
---@return true|nil, moonrabbit.Error?
function recovery.declare(self, session, entities)
  -- Queues that get another name have it before they are bound.
  local ok, err = declare_some(self, session, entities, false)
  if not ok then return nil, err end
  return declare_some(self, session, entities, true)
end

-- ---- Channels ---------------------------------------------------------------------------------------

local function channel_refused(self, channel, err)
  if channel._over then return end
  report(self, channel, err)
  self._repairs:add("channel", channel, err)
end

--- Opens channels again, all in one go; those that did not are reported. nil, err: the session has ended.
---@param channels moonrabbit.Channel[]
---@return moonrabbit.Channel[]|nil opened, moonrabbit.Error?
function recovery.open_channels(self, session, channels)
  local pending, done = {}, {}
  for _, channel in ipairs(channels) do
    if not channel._over then
      local calls, err = channel:_attach(session)
      if calls then pending[#pending + 1] = { channel, calls } else channel_refused(self, channel, err) end
    end
  end
  local deadline = session.runtime.now() + self.call_timeout
  for _, each in ipairs(pending) do
    local ok, err = session:await_all(each[2], deadline)
    if not ok and err.kind == "timeout" then
      session:fail("the broker does not open channels: " .. err.message)
      return nil, err
    end
    if session.state ~= "open" then return nil, session.reason end
    if not ok then
      each[1]:_unattach()
      channel_refused(self, each[1], err)
    else
      done[#done + 1] = each[1]
    end
  end
  return done
end

--- A channel is usable again; or it was closed while it was opened.
function recovery.resume(self, channel)
  if channel._over then return channel:_unattach() end
  channel._reported = nil
  self._repairs:done(channel)
  channel:_resume()
end

-- ---- Consumers --------------------------------------------------------------------------------------

local function consumer_refused(self, consumer, err)
  if consumer._ended then return end
  report(self, consumer, err)
  self._repairs:add("consumer", consumer, err)
end

local function consumer_restored(self, consumer)
  local why = consumer:_resumed()
  if not why then return end
  consumer._reported = nil
  self._repairs:done(consumer)
  self._log("info", ("the consumer on '%s' consumes again (it had ended: %s)"):format(consumer.queue, why.message))
  self:_event("consumer_recovered", consumer, why)
end

-- Those whose queue is there. The broker would close their channel for the others.
local function with_a_queue(self, session, consumers)
  local record, steps, found = self._record, {}, {}
  for _, consumer in ipairs(consumers) do
    local queue = record and record.queues[consumer.queue]
    if is_missing(queue) then
      consumer_refused(self, consumer, queue.failure)
    elseif queue and not queue.out and wanted(self, "queue", queue) or consumer.queue:find "^amq%.rabbitmq%." then
      found[#found + 1] = consumer
    else
      steps[#steps + 1] = {
        method = "queue.declare", fields = { queue = consumer.queue, passive = true },
        done = function() found[#found + 1] = consumer end,
        failed = function(err)
          if err.code == 404 or err.code == 405 then
            consumer_refused(self, consumer, err)
          else
            found[#found + 1] = consumer -- may not be asked, maybe may be consumed
          end
        end,
      }
    end
  end
  local ok, err = pipeline.run(self, session, steps, self.call_timeout)
  if not ok then return nil, err end
  return found
end

-- Waits for the answers to what `consumer:_subscribe` sent. `alone`: nothing else was out.
local function started(self, session, consumer, calls, deadline, alone)
  local ok, err = session:await_all(calls, deadline)
  if ok then
    -- It may have been lost again before this task ran: then it is down for the next one that brings it back.
    if consumer._ended or consumer._asking == calls then consumer_restored(self, consumer) end
    return
  end
  consumer:_unsubscribed(calls, err)
  if session.state ~= "open" then
    if pipeline.is_answer(session.reason, "basic.consume") then
      if alone then
        report(self, consumer, session.reason)
        consumer:_give_up(session.reason)
      else
        self._careful = true
      end
    end
  elseif alone or err.kind == "timeout" then
    consumer_refused(self, consumer, err)
  else
    -- The channel comes back by itself; then one after the other shows whose fault it was.
    consumer.channel._careful = true
    if not consumer.channel._closed then consumer_refused(self, consumer, err) end
  end
end

-- Whether it can be asked for: not twice at a time, and not where the channel has gone meanwhile.
local function is_startable(consumer)
  return consumer._down and not consumer._ended and not consumer._asking and not consumer.channel._closed
end

local function start_one(self, session, consumer)
  if not is_startable(consumer) then return end
  local calls, err = consumer:_subscribe()
  if calls then
    started(self, session, consumer, calls, session.runtime.now() + self.call_timeout, true)
  elseif session.state == "open" then
    consumer_refused(self, consumer, err)
  end
end

local function start_all(self, session, consumers)
  local pending, careful = {}, {}
  for _, consumer in ipairs(consumers) do
    if self._careful or consumer.channel._careful then
      careful[#careful + 1] = consumer
    elseif is_startable(consumer) then
      local calls, err = consumer:_subscribe()
      if calls then pending[#pending + 1] = { consumer, calls } else consumer_refused(self, consumer, err) end
    end
  end
  local deadline = session.runtime.now() + self.call_timeout
  for _, each in ipairs(pending) do
    started(self, session, each[1], each[2], deadline, #pending == 1)
    if session.state ~= "open" then return end
  end
  for _, consumer in ipairs(careful) do
    start_one(self, session, consumer)
    if session.state ~= "open" then return end
  end
  for _, consumer in ipairs(careful) do
    if not consumer.channel._closed then consumer.channel._careful = nil end
  end
end

--- Starts consumers again that are down and whose channel is open.
---@param consumers moonrabbit.Consumer[]
---@return true|nil, moonrabbit.Error?
function recovery.consume(self, session, consumers)
  local chosen = {}
  for _, consumer in ipairs(consumers) do
    if consumer._down and not consumer._ended then
      if wanted(self, "consumer", consumer) then
        chosen[#chosen + 1] = consumer
      else
        consumer:_give_up(consumer._down)
      end
    end
  end
  local found, err = with_a_queue(self, session, chosen)
  if not found then return nil, err end
  start_all(self, session, found)
  return true
end

--- The consumers of channels that are down, in the order in which they were started.
---@param channels moonrabbit.Channel[]
---@return moonrabbit.Consumer[]
function recovery.consumers_of(channels)
  local list = {}
  for _, channel in ipairs(channels) do
    for _, consumer in pairs(channel._consumers) do
      if consumer._down then list[#list + 1] = consumer end
    end
  end
  table.sort(list, function(a, b) return a._serial < b._serial end)
  return list
end

-- ---- All of it --------------------------------------------------------------------------------------

local function surviving(self)
  local channels = {}
  for channel in pairs(self._channels) do channels[#channels + 1] = channel end
  table.sort(channels, function(a, b) return a._serial < b._serial end)
  return channels
end

--- Restores everything on a new session, and takes it as the connection's own as soon as channels can be used.
---@return true|nil, moonrabbit.Error?
function recovery.run(self, session, target)
  local ok, err, channels
  if self._state ~= "recovering" then return nil, self._reason end -- closed while the session was opened
  self._repairs:stop()
  if self._record then
    ok, err = recovery.declare(self, session, self._record:all())
    if not ok then return nil, err end
  end
  channels, err = recovery.open_channels(self, session, surviving(self))
  if not channels then return nil, err end
  if session.state ~= "open" then return nil, session.reason end
  if self._state ~= "recovering" then return nil, self._reason end
  self:_adopt(session, target)
  for _, channel in ipairs(channels) do recovery.resume(self, channel) end
  ok = recovery.consume(self, session, recovery.consumers_of(channels))
  if ok and session.state == "open" then
    self._careful = nil
    self:_event "recovered"
    self._log("info", "the connection is back: " .. session.endpoint)
  end
  return true
end

return recovery
