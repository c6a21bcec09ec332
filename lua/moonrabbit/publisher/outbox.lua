--- A publisher's outbox: what it has accepted is stored before it is sent, and deleted after its confirm.
--
-- The store (moonrabbit.outbox.sqlite, moonrabbit.outbox.memory) keeps rows by number:
--
-- * `add(record) -> row | nil, err`: stored for good when it returns
-- * `remove(rows) -> true | nil, err`
-- * `after(row) -> row, record | nil, nil | nil, err`: the next one behind it
-- * `get(row) -> record | nil, err`
-- * `count() -> integer | nil, err`, `close()`
--
-- What a store holds when it is opened, the backlog, goes out before anything new; what failed goes again on a timer.
-- @module moonrabbit.publisher.outbox

local described = require "moonrabbit.described"
local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"

---@class moonrabbit.OutboxOptions
---@field kind "memory"|"sqlite"
---@field path string?       the file of an sqlite outbox; it is made when it is not there
---@field most integer?      the most messages that it may hold; 1000000 by default
---@field interval number?   seconds after which what failed goes again; 30 by default
---@field synchronous boolean? (sqlite) each message is on the disk before it is sent, not only in the system's hands: it survives a power cut too; true by default

---@class moonrabbit.publisher.Outbox
---@field ending boolean?  nothing goes again any more
---@field backlog boolean  whether there are messages of before that have not been taken
---@field problem moonrabbit.Error?  why they cannot be read now
local Outbox = {}
Outbox.__index = Outbox

-- Deletes are gathered for so long, or until there are so many.
local GATHER_SECONDS, GATHER = 0.02, 128

-- SQLite takes these for databases that end with the process.
local function path(value)
  if type(value) ~= "string" or value == "" or value == ":memory:" then return "the path of a file" end
end

local schema = {
  kind = options.one_of("memory", "sqlite"), path = path, most = options.integer(1, 9007199254740991),
  interval = options.seconds, synchronous = options.boolean,
}

--- For the schema of a publisher's options.
function Outbox.kind(value)
  if value ~= "memory" and type(value) ~= "table" then return '"memory" or a table with a `kind`' end
end

-- The options with their defaults; throws.
local function checked(given, what, level, runtime)
  if type(given) == "string" then given = { kind = given } end
  options.check(what .. ": outbox", given, schema, level + 1)
  local opts = {}
  for key, value in pairs(given) do opts[key] = value end
  if not opts.kind then error(what .. ": outbox: 'kind' must be \"memory\" or \"sqlite\"", level) end
  if opts.kind == "sqlite" and not opts.path then error(what .. ": outbox: 'path', the file, is missing", level) end
  if opts.kind == "memory" and (opts.path or opts.synchronous ~= nil) then
    error(what .. ": outbox: 'path' and 'synchronous' are for kind = \"sqlite\"", level)
  end
  if opts.kind == "sqlite" and runtime.name == "resty" then
    error(what .. ": outbox: sqlite would block every request of the nginx worker; use \"memory\", or publish from "
      .. "a process of its own", level)
  end
  opts.most, opts.interval = opts.most or 1000000, opts.interval or 30
  return opts
end

--- Opens it. `on_backlog` is called when there is something to take again.
---@return moonrabbit.publisher.Outbox|nil, moonrabbit.Error?
function Outbox.open(given, what, level, runtime, log)
  local opts = checked(given, what, level + 1, runtime)
  local store, err = require("moonrabbit.outbox." .. opts.kind).open(opts)
  if not store then return nil, err end
  local count
  count, err = store:count()
  if not count then
    store:close()
    return nil, err
  end
  return setmetatable({
    store = store, count = count, backlog = count > 0,
    _most = opts.most, _interval = opts.interval, _runtime = runtime, _log = log,
    _at = 0, _read = count == 0, _done = {}, _failed = {}, _again = {}, _next = 1,
    _closed = false, _closing = runtime.condition(),
  }, Outbox)
end

--- Stores a message: its row.
function Outbox:add(record)
  if self.count >= self._most then
    return nil, errors.new { kind = "overflow", temporary = true,
      message = ("the outbox is full: it holds %d messages"):format(self.count) }
  end
  local row, err = self.store:add(record)
  if not row then return nil, err end
  self.count = self.count + 1
  return row
end

-- ---- What is confirmed ------------------------------------------------------------------------------

--- Deletes what is confirmed. What cannot be deleted is tried again, and may be sent twice.
function Outbox:flush()
  local rows = self._done
  if #rows == 0 or self._closed then return true end
  self._done = {}
  local whole, ok, err = pcall(self.store.remove, self.store, rows)
  if not whole then ok, err = nil, described(ok) end -- memory
  if ok then
    self.count = self.count - #rows
    return true
  end
  for _, row in ipairs(self._done) do rows[#rows + 1] = row end
  self._done = rows
  self._runtime.spawn(self._log, "warn", "confirmed messages stay in the outbox for now: " .. tostring(err))
  return nil, err
end

local function flush_later(self)
  self._runtime.spawn(function()
    local pause = GATHER_SECONDS
    while #self._done > 0 and not self._closed do
      self._closing:wait(pause)
      if not self:flush() then pause = self._interval end
    end
    self._flushing = false
  end)
  self._flushing = true
end

--- A row's message is confirmed.
function Outbox:done(row)
  self._done[#self._done + 1] = row
  if not self._flushing then flush_later(self) end
  if #self._done == GATHER then self:flush() end
end

-- ---- What goes again --------------------------------------------------------------------------------

-- Calls fn when the interval has passed, unless the outbox is closed by then.
local function later(self, fn)
  self._runtime.spawn(function()
    self._closing:wait(self._interval)
    if self._closed then return end
    fn()
    self.backlog = true
    if self.on_backlog then self.on_backlog() end
  end)
end

-- What has failed joins those that wait for room since the last time, in the order of all.
local function join(self)
  local list = {}
  for i = self._next, #self._again do list[#list + 1] = self._again[i] end
  for _, row in ipairs(self._failed) do list[#list + 1] = row end
  table.sort(list)
  self._again, self._next, self._failed, self._waiting = list, 1, {}, false
end

--- A row's message has failed: it stays, and goes again when the interval has passed.
function Outbox:failed(row)
  self._failed[#self._failed + 1] = row
  if self._waiting or self._closed or self.ending then return end
  later(self, function() join(self) end)
  self._waiting = true
end

--- A row's message was not taken from here, and nobody else is told why.
---@param err moonrabbit.Error
function Outbox:refused(row, err)
  self._runtime.spawn(self._log, "error", "a message stays in the outbox, for it cannot be sent: " .. tostring(err))
  self:failed(row)
end

-- The next of those that failed; nil, nil or err.
local function next_failed(self)
  local row = self._again[self._next]
  while row do
    local record, err = self.store:get(row)
    if err then return nil, err end
    self._next = self._next + 1
    if record then
      record.row, record.again = row, true
      return record
    end
    row = self._again[self._next]
  end
  self._again, self._next = {}, 1
end

-- The next of those that were there from the start; nil, nil or err.
local function next_old(self)
  if self._read then return nil end
  local row, record, err = self.store:after(self._at)
  if err then return nil, err end
  if not row then
    self._read = true
    return nil
  end
  self._at = row
  record.row, record.again = row, true
  return record
end

-- What cannot be read now is read later, still before anything new.
local function unreadable(self, err)
  self.problem = err
  self._runtime.spawn(self._log, "error", "the outbox cannot be read: " .. tostring(err))
  later(self, function() self.problem = nil end)
end

--- The next message of the backlog, or nil: there is none any more, or none can be read now (`problem`).
---@return table? record
function Outbox:next()
  if not self.backlog or self.problem then return nil end
  local record, err = next_old(self)
  if not record and not err then record, err = next_failed(self) end
  if err then
    unreadable(self, err)
  elseif not record then
    self.backlog = false
  end
  return record
end

--- Deletes what is confirmed, and lets go of the store.
function Outbox:close()
  if self._closed then return end
  self:flush()
  self._closed = true
  self._closing:broadcast() -- who waits for a time would keep the loop
  self.store:close()
end

return Outbox
