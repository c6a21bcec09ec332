--- A de-duplication store in a table of a database, by its unique index: nothing is forgotten by a crash.
--
--     dedupe = mr.dedupe.sql { driver = "sqlite3", source = "/var/lib/orders/seen.db", ttl = 30 * 86400 }
--     dedupe = mr.dedupe.sql { driver = "postgres", source = "orders", user = "orders", password = secret }
--
-- A claim is an `INSERT` that the primary key lets only one caller do. A claim whose lease has ended is taken over by an
-- `UPDATE` that names the old one, so again only one caller gets it.
--
-- **In your own transaction.** With `connection`, a function that returns your LuaSQL connection, the store begins a
-- transaction on it, inserts the key, and lets the handler go on; its commit commits, its abort rolls back. So the key
-- and what the handler has written on that connection become true together or not at all: a message is processed
-- once, whatever dies when. A commit that fails has undone both: the message is handled again, or fails. There is one
-- transaction on a connection: other messages wait meanwhile (`begin` answers "running"), so the `concurrency` of such a
-- consumer is 1 by default. Where the connection is lost, your function is to open another one.
--
-- It goes through LuaSQL, which **blocks** the event loop for as long as the database takes: keep the database near, or
-- use `redis`. In nginx it is refused.
-- @module moonrabbit.app.dedupe.sql

local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local random = require "moonrabbit.random"

local sql = {}

---@class moonrabbit.dedupe.Sql
---@field joined boolean  whether its commit is that of the user's own transaction
local Store = {}
Store.__index = Store

---@class moonrabbit.dedupe.SqlOptions
---@field driver "sqlite3"|"postgres"
---@field source string?     SQLite's file, PostgreSQL's database
---@field user string?       of PostgreSQL
---@field password (string|fun(): string)?
---@field host string?       of PostgreSQL; its unix socket by default
---@field port integer?      of PostgreSQL; 5432 by default
---@field connection (fun(): any)?  your own LuaSQL connection, for a transaction with the handler's writes
---@field table string?      "moonrabbit_seen" by default; made when it is not there
---@field ttl number?        seconds that a key is remembered after its commit; 30 days by default
---@field now (fun(): number)?  wall clock, in seconds; os.time by default

local function table_name(value)
  if type(value) ~= "string" or not value:match "^[%a_][%w_]*%.?[%w_]*$" then return "a name of a table" end
end

local store_options = {
  driver = options.one_of("sqlite3", "postgres"), source = options.string, user = options.string,
  password = options.either(options.string, options.callback), host = options.string,
  port = options.integer(1, 65535), connection = options.callback, table = table_name, ttl = options.seconds,
  now = options.callback,
}

-- Old keys are deleted once in so many commits, at most so many at a time.
local SWEEP_EVERY, SWEEP_MOST = 1000, 5000
-- Claims without an answer that are remembered; past that all are forgotten, and end with their leases.
local MOST_UNSURE = 10000
-- How long another process may hold a lock, in milliseconds, before that is an error.
local LOCK_TIMEOUT = 5000

--- Makes one; nothing is connected yet.
---@param opts moonrabbit.dedupe.SqlOptions
---@param level integer?
---@return moonrabbit.dedupe.Sql
function sql.new(opts, level)
  level = (level or 1) + 1
  opts = options.check("dedupe.sql", opts, store_options, level)
  if not opts.driver then error("dedupe.sql: option 'driver' is missing", level) end
  if opts.connection and (opts.source or opts.user or opts.password or opts.host or opts.port) then
    error("dedupe.sql: with 'connection' the other options of a connection mean nothing", level)
  end
  for _, name in ipairs { "user", "password", "host", "port" } do
    if opts.driver == "sqlite3" and opts[name] ~= nil then
      error(("dedupe.sql: option '%s' is PostgreSQL's"):format(name), level)
    end
  end
  if not opts.connection and not opts.source then error("dedupe.sql: option 'source' is missing", level) end
  if opts.ttl == 0 then error("dedupe.sql: option 'ttl' must be more than 0", level) end
  return setmetatable({
    opts = opts, driver = opts.driver, table = opts.table or "moonrabbit_seen", ttl = opts.ttl or 30 * 86400,
    now = opts.now or os.time, joined = opts.connection ~= nil, commits = 0, leases = {},
    unsure = {}, how_many_unsure = 0, -- key -> number of a claim that the database did not answer to
  }, Store)
end

--- Refuses runtimes whose loop it would block.
---@package
function Store.attach(_, runtime)
  if runtime.name == "resty" then
    error("dedupe.sql would block nginx's worker: use dedupe.redis or dedupe.shared there", 0)
  end
end

-- ---- Connections ---------------------------------------------------------------------------------------

local function library(driver)
  local name = "luasql." .. driver
  local ok, found = pcall(require, name)
  if ok then return found end
  error(("dedupe.sql needs LuaSQL (Debian: lua-sql-%s; else: luarocks install luasql-%s): %s"):format(
    driver == "postgres" and "postgres" or "sqlite3", driver, tostring(found):match "^[^\n]*"), 0)
end

-- The database's words, without a password that it might repeat.
local function failed(self, what, problem)
  local text = tostring(problem):gsub("^LuaSQL: ", ""):gsub("%s+$", "")
  local secret = self.secret
  if secret and #secret > 3 then
    local at, last = text:find(secret, 1, true)
    if at then text = text:sub(1, at - 1) .. "***" .. text:sub(last + 1) end
  end
  return errors.new { kind = "closed", temporary = true, message = what .. ": " .. text }
end

local function open_postgres(self, environment)
  local opts = self.opts
  local password = opts.password
  if type(password) == "function" then password = password() end
  self.secret = password
  return environment:connect(opts.source, opts.user or "", password or "", opts.host or "",
    opts.port and tostring(opts.port) or "")
end

local function open(self)
  if self.joined then return self.opts.connection() end
  self.environment = self.environment or library(self.driver)[self.driver]()
  local connection, problem
  if self.driver == "sqlite3" then
    connection, problem = self.environment:connect(self.opts.source, LOCK_TIMEOUT)
  else
    connection, problem = open_postgres(self, self.environment)
  end
  if not connection then return nil, problem end
  if self.driver == "postgres" then connection:execute(("SET lock_timeout = %d"):format(LOCK_TIMEOUT)) end
  return connection
end

local function execute(self, statement)
  local ok, result, problem = pcall(self.connection.execute, self.connection, statement)
  if not ok then return nil, result end
  return result, problem
end

-- `claimed` 0: done; else the number of a claim. `ends` is when the lease or the memory of it ends.
local function create_table(self)
  return execute(self, ("CREATE TABLE IF NOT EXISTS %s (message_key VARCHAR(1024) NOT NULL PRIMARY KEY, "
    .. "claimed BIGINT NOT NULL, ends DOUBLE PRECISION NOT NULL)"):format(self.table))
end

local function drop_connection(self)
  local connection = self.connection
  self.connection = nil
  if connection and not self.joined then pcall(connection.close, connection) end
end

-- nil, err when there is no connection to be had.
local function ready(self)
  local connection, problem
  if self.joined then
    connection, problem = open(self)
    if not connection then return nil, failed(self, "the database", problem or "'connection' returned nothing") end
    if connection == self.connection then return true end
  elseif self.connection then
    return true
  else
    connection, problem = open(self)
    if not connection then return nil, failed(self, "cannot connect to the database", problem) end
  end
  self.connection = connection
  local made
  made, problem = create_table(self)
  if made == nil then
    drop_connection(self)
    return nil, failed(self, "cannot make the table " .. self.table, problem)
  end
  return true
end

-- ---- Statements ---------------------------------------------------------------------------------------

-- Keys may be any bytes; the database takes text. What is not plain goes as hexadecimal digits.
local function literal(key)
  if #key <= 512 and not key:find "[^%w%-_.:/@+ ]" then return "'k:" .. key .. "'" end
  return "'x:" .. key:gsub(".", function(c) return ("%02x"):format(c:byte()) end) .. "'"
end

local function row(self, statement)
  local cursor, problem = execute(self, statement)
  if cursor == nil then return nil, problem end
  if type(cursor) ~= "userdata" and type(cursor) ~= "table" then return false end
  local values = cursor:fetch({}, "n")
  cursor:close()
  return values or false
end

local function affected(result) return tonumber(result) or 0 end

-- A number unlike those of other claims, of this and other processes; 0 is what is done.
local function claim_number()
  return ("%.0f"):format(1 + random.integer())
end

local function insert(self, key, claim, ends)
  return execute(self, ("INSERT INTO %s (message_key, claimed, ends) VALUES (%s, %s, %.3f) "
    .. "ON CONFLICT (message_key) DO NOTHING"):format(self.table, literal(key), claim, ends))
end

local function take_over(self, key, claim, ends, old)
  return execute(self, ("UPDATE %s SET claimed = %s, ends = %.3f WHERE message_key = %s AND claimed = %s "
    .. "AND ends <= %.3f"):format(self.table, claim, ends, literal(key), old, self.now()))
end

local function look(self, key)
  return row(self, ("SELECT claimed, ends FROM %s WHERE message_key = %s"):format(self.table, literal(key)))
end

-- The connection may be what is broken: the next call makes a new one.
local function broken(self, what, problem)
  if self.joined then pcall(function() self.connection:rollback() end) end
  self.open_key = nil
  drop_connection(self)
  return nil, failed(self, what, problem)
end

-- ---- The store ----------------------------------------------------------------------------------------

local function claim_row(self, key, lease, claim)
  local ends = self.now() + lease
  local result, problem = insert(self, key, claim, ends)
  if result == nil then return nil, problem end
  if affected(result) > 0 then return "new" end
  local found
  found, problem = look(self, key)
  if found == nil then return nil, problem end
  if not found then return "running" end -- given back between the two statements
  local old, old_ends = ("%.0f"):format(tonumber(found[1])), tonumber(found[2])
  if old == claim then return "new" end -- the answer to a first try was lost with its connection
  if old_ends > self.now() then return old == "0" and "done" or "running" end
  result, problem = take_over(self, key, claim, ends, old)
  if result == nil then return nil, problem end
  return affected(result) > 0 and "new" or "running"
end

-- Begins the transaction that the handler's writes join.
local function begin_joined(self, key)
  if self.open_key then return "running" end
  if self.manual ~= self.connection then
    self.connection:setautocommit(false)
    self.manual = self.connection
  end
  local state, problem = claim_row(self, key, 0, claim_number())
  if state == "new" then
    self.open_key = key
    local done
    done, problem = execute(self, ("UPDATE %s SET claimed = 0, ends = %.3f WHERE message_key = %s"):format(self.table,
      self.now() + self.ttl, literal(key)))
    if done == nil then state = nil end
  end
  if state == nil then return broken(self, "claiming a key", problem) end
  if state ~= "new" then self.connection:rollback() end
  return state
end

--- Claims a key for `lease` seconds: "new", "running" or "done".
---@param key string
---@param lease number seconds; with `connection` a claim lasts as long as its transaction
---@return "new"|"running"|"done"|nil state, moonrabbit.Error?
function Store:begin(key, lease)
  local ok, err = ready(self)
  if not ok then return nil, err end
  if self.joined then return begin_joined(self, key) end
  -- A claim that had no answer is made again as it was: it may have come through.
  local claim = self.unsure[key] or claim_number()
  self.unsure[key] = nil
  local state, problem = claim_row(self, key, lease, claim)
  if state == nil then
    if self.how_many_unsure >= MOST_UNSURE then self.unsure, self.how_many_unsure = {}, 0 end
    self.unsure[key], self.how_many_unsure = claim, self.how_many_unsure + 1
    return broken(self, "claiming a key", problem)
  end
  if state == "new" then self.leases[key] = claim end
  return state
end

local function sweep(self)
  self.commits = self.commits + 1
  if self.commits % SWEEP_EVERY ~= 0 then return end
  execute(self, ("DELETE FROM %s WHERE message_key IN (SELECT message_key FROM %s WHERE ends <= %.3f LIMIT %d)"):format(
    self.table, self.table, self.now(), SWEEP_MOST))
end

local function commit_joined(self, key)
  if self.open_key ~= key then
    return nil, errors.new { kind = "closed", temporary = false,
      message = "the transaction of this message is over: it was rolled back" }
  end
  -- PostgreSQL takes the COMMIT of a transaction in which a statement failed, and rolls it back.
  local found, problem = look(self, key)
  if not found then return broken(self, "committing", problem or "the transaction was rolled back") end
  local ok, done
  ok, done, problem = pcall(self.connection.commit, self.connection)
  self.open_key = nil
  if not ok or not done then return broken(self, "committing", not ok and done or problem or "the database refused") end
  return true
end

--- Remembers a key as done, for `ttl` seconds; with `connection`, commits the transaction.
---@param key string
---@return true|nil, moonrabbit.Error?
function Store:commit(key)
  if self.joined then return commit_joined(self, key) end
  local ok, err = ready(self)
  if not ok then return nil, err end
  local ends = self.now() + self.ttl
  local result, problem = execute(self, ("INSERT INTO %s (message_key, claimed, ends) VALUES (%s, 0, %.3f) "
    .. "ON CONFLICT (message_key) DO UPDATE SET claimed = 0, ends = %.3f"):format(self.table, literal(key), ends, ends))
  if result == nil then return broken(self, "committing a key", problem) end
  self.leases[key] = nil
  sweep(self)
  return true
end

--- Gives a claim back; with `connection`, rolls the transaction back.
---@param key string
---@return true|nil, moonrabbit.Error?
function Store:abort(key)
  if self.joined then
    if self.open_key == key then
      self.open_key = nil
      local ok, problem = pcall(self.connection.rollback, self.connection)
      if not ok then return broken(self, "rolling back", problem) end
    end
    return true
  end
  local claim = self.leases[key]
  if not claim then return true end
  local ok, err = ready(self)
  if not ok then return nil, err end
  local result, problem = execute(self, ("DELETE FROM %s WHERE message_key = %s AND claimed = %s"):format(self.table,
    literal(key), claim))
  if result == nil then return broken(self, "giving a key back", problem) end
  self.leases[key] = nil
  return true
end

--- Closes its connection, if it is its own.
function Store:close()
  drop_connection(self)
  if self.environment then
    pcall(self.environment.close, self.environment)
    self.environment = nil
  end
end

return sql
