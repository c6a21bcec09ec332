--- The runtime for OpenResty and nginx with ngx_lua: cosockets, light threads, semaphores. The contract
--- of every function is in docs/internals.md.
--
-- A connection belongs to the request or timer that opened it, as its cosocket does: everything that
-- waits on it runs in light threads of that handler. Loads moonrabbit.core only.

local ffi = require "ffi"
local semaphore = require "ngx.semaphore"

local C = ffi.C
pcall(ffi.cdef, "typedef struct { long tv_sec; long tv_nsec; } moonrabbit_timespec;")
pcall(ffi.cdef, "int clock_gettime(int clock, void *time);")

local ngx_sleep, thread_spawn, running = ngx.sleep, ngx.thread.spawn, coroutine.running

local M = { name = "resty", pcall = pcall }

-- ---- Time -------------------------------------------------------------------------------------------

-- ngx.now is the wall clock, and stands still during a turn.
local timespec = ffi.new "moonrabbit_timespec"
local CLOCK_MONOTONIC = 1

function M.now()
  C.clock_gettime(CLOCK_MONOTONIC, timespec)
  return tonumber(timespec.tv_sec) + tonumber(timespec.tv_nsec) / 1e9
end

local now = M.now

-- nginx without OpenResty's patches has no zero delay and complains about it.
local LEAST = 0.001

function M.sleep(seconds) ngx_sleep(seconds > LEAST and seconds or LEAST) end

-- ---- Tasks ------------------------------------------------------------------------------------------

local tasks = setmetatable({}, { __mode = "k" }) -- coroutine -> task

M.cancelled = setmetatable({}, { __tostring = function() return "the task was cancelled" end })

local levels = { debug = ngx.DEBUG, info = ngx.INFO, warn = ngx.WARN, error = ngx.ERR }

function M.log(level, text) ngx.log(levels[level] or ngx.INFO, "moonrabbit: ", text) end

function M.on_error(text) M.log("error", "error in a task: " .. text) end

local function traceback(err)
  if err == M.cancelled then return err end
  return debug.traceback(tostring(err), 2)
end

local function body(task, fn, ...)
  tasks[running()] = task
  ngx_sleep(LEAST) -- a task starts at the next turn
  local arguments, n = { ... }, select("#", ...)
  local ok, err = xpcall(function() fn(unpack(arguments, 1, n)) end, traceback)
  task.over = true
  if not ok and err ~= M.cancelled then M.on_error(err, task) end
end

function M.spawn(fn, ...)
  local task = {}
  local thread, err = thread_spawn(body, task, fn, ...)
  if not thread then error("cannot start a light thread: " .. tostring(err), 2) end
  task.thread = thread
  return task
end

function M.current()
  return tasks[running()]
end

--- The task's next wait on a condition throws M.cancelled.
function M.cancel(task)
  if task.over then return end
  task.cancelling = true
  if task.on then task.on:broadcast() end
end

-- ---- Conditions -------------------------------------------------------------------------------------

local Condition = {}
Condition.__index = Condition

-- As long as nginx's timers allow with some room; waits without a timeout are made of these.
local LONG = 86400

function Condition:wait(timeout)
  local task = tasks[running()]
  self.waiting = self.waiting + 1
  if task then task.on = self end
  local ok = self.semaphore:wait(timeout or LONG)
  while not ok and not timeout do ok = self.semaphore:wait(LONG) end
  if task then task.on = nil end
  self.waiting = self.waiting - 1
  if ok then
    self.posted = self.posted - 1
  elseif self.posted > self.waiting then
    -- The signal came with the timeout: it was this one's, and is not kept.
    self.semaphore:wait(0)
    self.posted = self.posted - 1
  end
  if task and task.cancelling then
    task.cancelling = false
    error(M.cancelled, 0)
  end
  return ok and true or false
end

function Condition:signal()
  if self.posted < self.waiting then
    self.posted = self.posted + 1
    self.semaphore:post(1)
  end
end

function Condition:broadcast()
  local n = self.waiting - self.posted
  if n > 0 then
    self.posted = self.posted + n
    self.semaphore:post(n)
  end
end

function M.condition()
  return setmetatable({ semaphore = semaphore.new(), waiting = 0, posted = 0 }, Condition)
end

-- ---- Transports -------------------------------------------------------------------------------------

local Transport = {}
Transport.__index = Transport

-- A read that times out leaves the socket usable: so often a reader looks whether it was closed.
local READ_TIMEOUT = 1000
local SEND_TIMEOUT = 60000
local CHUNK = 65536

local function really_close(self)
  if self.socket and not self.reading and not self.writing then
    local socket = self.socket
    self.socket = nil
    socket:close()
  end
end

function Transport:receive(max)
  while not self.closed do
    self.reading = true
    local bytes, err = self.socket:receiveany(max)
    self.reading = false
    if bytes then return bytes end
    if err ~= "timeout" then
      self.closed = true
      really_close(self)
      return nil, "closed", err == "closed" and "the broker closed the connection" or err
    end
  end
  really_close(self)
  return nil, "closed", "closed"
end

function Transport:fill(engine)
  local bytes = self.rest
  if not bytes then
    local kind, text
    bytes, kind, text = self:receive(CHUNK)
    if not bytes then return nil, kind, text end
  end
  local taken = engine:feed(bytes, now())
  self.rest = taken < #bytes and bytes:sub(taken + 1) or nil
  if taken == 0 then return nil, "full" end
  return taken
end

function Transport:write(bytes)
  if self.closed then return nil, "closed", "closed" end
  self.writing = true
  local sent, err = self.socket:send(bytes)
  self.writing = false
  if sent then return true end
  if self.closed then really_close(self) end
  return nil, "closed", err
end

function Transport:flush(engine)
  while true do
    local bytes = engine:drain(now())
    if bytes == "" then return true end
    local ok, kind, text = self:write(bytes)
    if not ok then return nil, kind, text end
  end
end

--- A cosocket cannot write without maybe waiting.
function Transport:try_flush() return nil, "again" end -- luacheck: ignore 212

function Transport:read(max) return self:receive(max or CHUNK) end

function Transport:close()
  self.closed = true
  really_close(self)
end

local function kind_of(err)
  if err == "timeout" then return "timeout", true end
  if err:find("refused", 1, true) then return "refused", true end
  if err:find("resolve", 1, true) or err:find("resolver", 1, true) then return "dns", true end
  return "closed", true
end

local function check_tls(tls)
  for option, directive in pairs { ca = "lua_ssl_trusted_certificate", min_version = "lua_ssl_protocols" } do
    if tls[option] then
      error("option 'tls." .. option .. "' has no effect in nginx: use its directive " .. directive, 0)
    end
  end
  if tls.cert or tls.key then error("option 'tls.cert': client certificates are not available in nginx yet", 0) end
end

--- See docs/internals.md.
function M.open(endpoint, tls, timeout)
  if tls then check_tls(tls) end
  local socket = ngx.socket.tcp()
  local ms = math.max(1, math.floor((timeout or 60) * 1000))
  socket:settimeouts(ms, SEND_TIMEOUT, ms)
  local ok, err
  if endpoint.path then
    ok, err = socket:connect("unix:" .. endpoint.path)
  else
    -- nginx asks no hosts file.
    local host = endpoint.host == "localhost" and "127.0.0.1" or endpoint.host
    if host:find(":", 1, true) then host = "[" .. host .. "]" end
    ok, err = socket:connect(host, endpoint.port)
  end
  if not ok then
    local kind, temporary = kind_of(err)
    return nil, kind, "cannot connect: " .. err, temporary
  end
  if tls then
    local session
    session, err = socket:sslhandshake(nil, tls.server_name, tls.verify ~= false)
    if not session then
      socket:close()
      if err == "timeout" then return nil, "timeout", "no answer in time (TLS handshake)", true end
      return nil, "tls", "the TLS handshake failed: " .. tostring(err), false
    end
  end
  socket:settimeouts(ms, SEND_TIMEOUT, READ_TIMEOUT)
  return setmetatable({ socket = socket, closed = false, reading = false, writing = false }, Transport)
end

return M
