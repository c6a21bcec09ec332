--- Cosockets as docs/internals.md describes transports.
--
-- A cosocket belongs to the handler (request or timer) that made it. One light thread may read it and
-- one write it; neither can be interrupted, and closing it while one of them waits fails. But a light thread can be
-- killed, by the one that started it. So each transport has two of its own: one reads ahead, and waits as long as it
-- takes; the other (which has connected before, in open.lua) started it, waits until the transport is closed, and ends it
-- then. Whoever wants bytes waits on a condition, which anybody can end. So nothing has to wake up only to look.

local get_request = require("resty.core.base").get_request
local semaphore = require "ngx.semaphore"
local limits = require "moonrabbit.runtime.resty.limits"

local thread_spawn, thread_kill, exiting = ngx.thread.spawn, ngx.thread.kill, ngx.worker.exiting

---@class moonrabbit.resty.Transport
local Transport = { blind = true }
Transport.__index = Transport

-- A read is ended by other means.
local LONG, ms = limits.LONG, limits.ms
local READ_TIMEOUT = LONG * 1000
local SEND_TIMEOUT = 60000
local CHUNK = 65536
-- So often a closed one that still writes looks whether its worker is to leave.
local LOOK = 1
-- So many bytes are read before anybody asks for them.
local AHEAD = 4 * CHUNK

-- The light thread that reads; killed when the transport is closed.
local function read_ahead(self)
  local socket, chunks = self.socket, self.chunks
  while true do
    local bytes, err = socket:receiveany(CHUNK)
    if bytes then
      self.last = self.last + 1
      chunks[self.last] = bytes
      self.ahead = self.ahead + #bytes
      self.arrived:signal()
      while self.ahead >= AHEAD do self.taken:wait(LONG) end
    elseif err ~= "timeout" then
      self.failure = err == "closed" and "the broker closed the connection" or tostring(err)
      self.arrived:broadcast()
      return
    end
  end
end

local M = {}

--- What the light thread that has connected does from then on: it owns the one that reads, until the end. What is being
--- written is written first: a writer would never learn of its socket's end. In a worker that leaves nobody minds, and a
--- peer that takes nothing must not hold it up: so it looks now and then whether that is so.
---@param self moonrabbit.resty.Transport
function M.own(self)
  local reader = thread_spawn(read_ahead, self)
  while not self.closed or self.writing and not exiting() do self.over:wait(self.closed and LOOK or LONG) end
  thread_kill(reader)
  self.socket:close()
end

local function take(self)
  local first = self.first
  local bytes = self.chunks[first]
  if not bytes then return nil end
  self.chunks[first] = nil
  self.first = first + 1
  if self.ahead >= AHEAD and self.ahead - #bytes < AHEAD then self.taken:post(1) end
  self.ahead = self.ahead - #bytes
  return bytes
end

-- The next bytes that came, as soon as there are any.
local function receive(self, timeout)
  local now = self.now
  local deadline = timeout and now() + timeout
  while not self.closed do
    local bytes = take(self)
    if bytes then return bytes end
    if self.failure then return nil, "closed", self.failure end
    local left = deadline and deadline - now()
    if left and left <= 0 then return nil, "timeout", "nothing to read in time" end
    self.arrived:wait(left)
  end
  return nil, "closed", "closed"
end

-- What the last call left, else the next bytes; at most `most` of them.
local function next_bytes(self, most, timeout)
  local bytes = self.rest
  self.rest = nil
  if not bytes then
    local kind, text
    bytes, kind, text = receive(self, timeout)
    if not bytes then return nil, kind, text end
  end
  if #bytes > most then bytes, self.rest = bytes:sub(1, most), bytes:sub(most + 1) end
  return bytes
end

--- Waits for bytes and gives them to the engine.
---@return integer|nil n, string? kind, string? text
function Transport:fill(engine)
  local bytes = self.rest
  if not bytes then
    local kind, text
    bytes, kind, text = receive(self)
    if not bytes then return nil, kind, text end
  end
  local taken = engine:feed(bytes, self.now())
  self.rest = taken < #bytes and bytes:sub(taken + 1) or nil
  if taken == 0 then return nil, "full" end
  return taken
end

--- Some bytes, as soon as there are any. At the end: nil, "closed".
---@param most integer? bytes
---@param timeout number? seconds
---@return string|nil bytes, string? kind, string? text
function Transport:read(most, timeout) return next_bytes(self, most or CHUNK, timeout) end

--- Writes all the bytes.
---@param bytes string
---@param timeout number? seconds; what was not written in time leaves the socket unusable
---@return boolean|nil ok, string? kind, string? text
function Transport:write(bytes, timeout)
  if self.closed then return nil, "closed", "closed" end
  local send_timeout = timeout and ms(timeout) or SEND_TIMEOUT
  if send_timeout ~= self.send_timeout then
    self.send_timeout = send_timeout
    self.socket:settimeouts(SEND_TIMEOUT, send_timeout, READ_TIMEOUT)
  end
  self.writing = true
  local sent, err = self.socket:send(bytes)
  self.writing = false
  if self.closed then self.over:post(1) end
  if sent then return true end
  if err == "timeout" then return nil, "timeout", "the peer does not read in time" end
  return nil, "closed", err
end

--- Writes everything that the engine has to write.
---@return boolean|nil ok, string? kind, string? text
function Transport:flush(engine)
  while true do
    local bytes = engine:drain(self.now(), CHUNK)
    if bytes == "" then return true end
    local ok, kind, text = self:write(bytes)
    if not ok then return nil, kind, text end
  end
end

--- A cosocket cannot write without maybe waiting.
function Transport:try_flush() return nil, "again" end -- luacheck: ignore 212

--- nginx does not tell.
function Transport:tls_info() return self.secure and "TLS" or nil end

--- Throws in any handler but the one that opened it.
function Transport:check_owner()
  if self.request ~= get_request() then
    error("this connection belongs to another request or timer of nginx: each needs one of its own"
      .. " (or moonrabbit.resty's publish, call and run, which are for all)", 0)
  end
end

--- Idempotent; whoever reads on it gets nil, "closed".
function Transport:close()
  if self.closed then return end
  self.closed = true
  self.arrived:broadcast()
  self.over:post(1)
end

---@param runtime table the resty runtime
---@param socket table a connected cosocket of the running handler; the transport's from now on
---@param secure boolean whether it speaks TLS
---@return moonrabbit.resty.Transport
function M.new(runtime, socket, secure)
  socket:settimeouts(SEND_TIMEOUT, SEND_TIMEOUT, READ_TIMEOUT)
  return setmetatable({
    socket = socket, secure = secure, request = get_request(), now = runtime.now,
    chunks = {}, first = 1, last = 0, ahead = 0, -- what was read and not taken yet
    arrived = runtime.condition(), taken = semaphore.new(), over = semaphore.new(),
    closed = false, writing = false, send_timeout = SEND_TIMEOUT,
  }, Transport)
end

return M
