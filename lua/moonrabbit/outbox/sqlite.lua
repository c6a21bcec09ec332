--- An outbox in an SQLite file, by LuaSQL (`luarocks install luasql-sqlite3`).
--
-- Each message is committed, and on the disk, before `add` returns; so it survives the death of the process, and with
-- `synchronous` (the default) that of the machine. Every call blocks the event loop for as long as the disk takes.
--
-- A file belongs to one publisher of one process at a time, for as long as it is open: the system's lock says so and
-- goes with the process, however it dies (as POSIX has it, it also goes when this process opens and closes the file by
-- other means, io.open say). Nothing is ever overwritten: a file that is damaged, or of something else,
-- is refused and left alone.
-- @module moonrabbit.outbox.sqlite

local errors = require "moonrabbit.errors"

local pcall = pcall

-- "mrob", so that nobody else's database is taken for an outbox; and the version of the table.
local APPLICATION, VERSION = 0x6d726f62, 1
-- Rows named in one DELETE.
local DELETE_AT_ONCE = 256
-- Bytes of a body in one statement.
local PART = 300000

---@class moonrabbit.outbox.Sqlite
local Sqlite = {}
Sqlite.__index = Sqlite

-- What SQLite says, and what that means here. Trying again helps where it is nil or true.
local causes = {
  { "database is locked", "another process or publisher uses the outbox", true },
  { "not a database", "the file is damaged, or no outbox; it was left as it is", false },
  { "malformed", "the file is damaged; it was left as it is", false },
  { "readonly", "the file, or its folder, may only be read", false },
  { "unable to open", "the file cannot be opened or made", false },
  { "is full", "the disk is full", true },
  { "disk I/O error", "the disk cannot be written or read", true },
}

local function failure(path, text)
  text = tostring(text):gsub("^LuaSQL: ", "")
  local message, temporary = text, true
  for _, cause in ipairs(causes) do
    if text:find(cause[1], 1, true) then
      message, temporary = ("%s (SQLite: %s)"):format(cause[2], text), cause[3]
      break
    end
  end
  return errors.new { kind = "outbox", message = ("outbox '%s': %s"):format(path, message), temporary = temporary }
end

-- The rows of a cursor, as arrays of values. LuaSQL ends them with nil, and with nil and a text where reading failed.
local function rows_of(cursor)
  local rows = {}
  local row, problem = cursor:fetch({}, "n")
  while row do
    rows[#rows + 1] = row
    row, problem = cursor:fetch({}, "n")
  end
  if problem then error(problem, 0) end
  cursor:close()
  return rows
end

-- Runs a statement: its rows or the number of rows it changed; nil, err.
local function run(self, statement)
  if not self._db then return nil, failure(self._path, "it is closed") end
  local whole, result, err = pcall(self._db.execute, self._db, statement)
  if not whole then return nil, failure(self._path, result) end
  if not result then return nil, failure(self._path, err) end
  if type(result) == "number" then return result end
  local fetched, rows = pcall(rows_of, result)
  if fetched then return rows end
  pcall(result.close, result)
  return nil, failure(self._path, rows)
end

local function one(self, statement)
  local rows, err = run(self, statement)
  if not rows then return nil, err end
  return rows[1] and rows[1][1]
end

local digits = {}
for i = 0, 255 do digits[string.char(i)] = ("%02x"):format(i) end
local function hex(bytes)
  return "x'" .. bytes:gsub("[%z\1-\255]", digits) .. "'"
end

-- ---- Opening ----------------------------------------------------------------------------------------

local function library()
  local there, module = pcall(require, "luasql.sqlite3")
  if not there then
    error("outbox: kind = \"sqlite\" needs LuaSQL (luarocks install luasql-sqlite3): " .. tostring(module), 0)
  end
  return module
end

-- A new file becomes an outbox, another one must be one.
local function prepare(self)
  local application, err = one(self, "PRAGMA application_id")
  if not application then return nil, err end
  local tables
  tables, err = one(self, "SELECT count(*) FROM sqlite_master")
  if not tables then return nil, err end
  if tables > 0 and application ~= APPLICATION then
    return nil, failure(self._path, "the file is a database of something else; it was left as it is")
  end
  local version
  version, err = one(self, "PRAGMA user_version")
  if not version then return nil, err end
  if tables > 0 and version ~= VERSION then
    return nil, failure(self._path, ("the file is an outbox of another version (%d, not %d)"):format(version, VERSION))
  end
  return tables > 0 and "old" or "new"
end

local function create(self)
  for _, statement in ipairs {
    "BEGIN EXCLUSIVE",
    "PRAGMA application_id = " .. APPLICATION,
    "PRAGMA user_version = " .. VERSION,
    "CREATE TABLE message (id INTEGER PRIMARY KEY AUTOINCREMENT, exchange BLOB NOT NULL, routing_key BLOB NOT NULL, "
      .. "mandatory INTEGER NOT NULL, props BLOB NOT NULL, body BLOB NOT NULL)",
    "COMMIT",
  } do
    local ok, err = run(self, statement)
    if not ok then return nil, err end
  end
  return true
end

-- Takes the lock, which is kept until the file is closed.
local function take(self, synchronous)
  for _, statement in ipairs {
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = " .. (synchronous and "FULL" or "NORMAL"),
    "BEGIN EXCLUSIVE", "COMMIT",
  } do
    local ok, err = run(self, statement)
    if not ok then return nil, err end
  end
  return true
end

local function whole(self)
  local verdict, err = one(self, "PRAGMA quick_check(1)")
  if not verdict then return nil, err end
  if verdict ~= "ok" then return nil, failure(self._path, "malformed: " .. tostring(verdict)) end
  return true
end

local function set_up(self, synchronous)
  local ok, err = prepare(self)
  if not ok then return nil, err end
  local state = ok
  ok, err = take(self, synchronous)
  if ok and state == "new" then ok, err = create(self) end
  if ok then ok, err = whole(self) end
  return ok, err
end

--- Opens the file, and makes it when it is not there.
---@param opts moonrabbit.OutboxOptions
---@return moonrabbit.outbox.Sqlite|nil, moonrabbit.Error?
function Sqlite.open(opts)
  local env = library().sqlite3()
  local db, err = env:connect(opts.path)
  if not db then
    env:close()
    return nil, failure(opts.path, err)
  end
  local self = setmetatable({ _path = opts.path, _env = env, _db = db }, Sqlite)
  local ok
  ok, err = set_up(self, opts.synchronous ~= false)
  if not ok then
    self:close()
    return nil, err
  end
  return self
end

-- ---- Messages ---------------------------------------------------------------------------------------

local function insert(self, record, body)
  local ok, err = run(self, ("INSERT INTO message (exchange, routing_key, mandatory, props, body) VALUES "
    .. "(%s, %s, %d, %s, %s)"):format(hex(record.exchange), hex(record.routing_key), record.mandatory and 1 or 0,
    hex(record.props), hex(body)))
  if not ok then return nil, err end
  local row
  row, err = one(self, "SELECT last_insert_rowid()")
  return row, err
end

-- A large body goes in by parts: the length of a statement is bounded.
local function insert_by_parts(self, record)
  local body = record.body
  local row, err = insert(self, record, body:sub(1, PART))
  if not row then return nil, err end
  for at = PART + 1, #body, PART do
    local ok
    ok, err = run(self, ("UPDATE message SET body = CAST(body || %s AS BLOB) WHERE id = %d"):format(
      hex(body:sub(at, at + PART - 1)), row))
    if not ok then return nil, err end
  end
  return row
end

function Sqlite:add(record)
  if #record.body <= PART then
    local row, err = insert(self, record, record.body)
    return row, err
  end
  local ok, err = run(self, "BEGIN")
  if not ok then return nil, err end
  local row
  row, err = insert_by_parts(self, record)
  if row then ok, err = run(self, "COMMIT") end
  if row and ok then return row end
  run(self, "ROLLBACK")
  return nil, err
end

function Sqlite:remove(rows)
  for from = 1, #rows, DELETE_AT_ONCE do
    local list = {}
    for i = from, math.min(#rows, from + DELETE_AT_ONCE - 1) do list[#list + 1] = ("%d"):format(rows[i]) end
    local ok, err = run(self, "DELETE FROM message WHERE id IN (" .. table.concat(list, ",") .. ")")
    if not ok then return nil, err end
  end
  return true
end

local function record_of(row)
  return { exchange = row[2], routing_key = row[3], mandatory = row[4] ~= 0, props = row[5], body = row[6] }
end

local COLUMNS = "SELECT id, exchange, routing_key, mandatory, props, body FROM message WHERE "

function Sqlite:get(id)
  local rows, err = run(self, COLUMNS .. ("id = %d"):format(id))
  if not rows then return nil, err end
  return rows[1] and record_of(rows[1])
end

function Sqlite:after(id)
  local rows, err = run(self, COLUMNS .. ("id > %d ORDER BY id LIMIT 1"):format(id))
  if not rows then return nil, nil, err end
  if rows[1] then return rows[1][1], record_of(rows[1]) end
end

function Sqlite:count()
  local count, err = one(self, "SELECT count(*) FROM message")
  return count, err
end

function Sqlite:close()
  if not self._db then return end
  pcall(self._db.close, self._db)
  pcall(self._env.close, self._env)
  self._db = nil
end

return Sqlite
