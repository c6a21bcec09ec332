-- The stores of outboxes, each by the same rules; and what SQLite's may meet.
local core = require "moonrabbit.core"
local process = require "support.process"
local native = require "moonrabbit.runtime.native"
local timers = require "moonrabbit.runtime.native.timers"
local Outbox = require "moonrabbit.publisher.outbox"
local Memory = require "moonrabbit.outbox.memory"
local Sqlite = require "moonrabbit.outbox.sqlite"

local there = pcall(require, "luasql.sqlite3")

local paths = {}
local function path()
  local name = os.tmpname()
  os.remove(name)
  paths[#paths + 1] = name
  return name
end

local every_byte = {}
for i = 0, 255 do every_byte[#every_byte + 1] = string.char(i) end
every_byte = table.concat(every_byte)

-- A record with every property, and headers of exact types.
local function record(body)
  local types = core.types
  local exchange, key, mandatory, props = core.pack({
    exchange = "ex\0change", routing_key = "key\255", mandatory = false, content_type = "text/plain", priority = 7,
    timestamp = 1700000000, message_id = "id", user_id = "guest", expiration = 1000, delivery_mode = 1,
    headers = { a = types.int8(-5), b = types.uint16(9), c = types.decimal(1234, 2),
      d = { types.float(0.5), core.null }, e = types.bytes(every_byte), f = true, g = { h = types.timestamp(1) },
      i = types.int64 "9007199254740993" },
  }, true)
  return { exchange = exchange, routing_key = key, mandatory = mandatory, props = props, body = body }
end

local function same(one, other)
  for _, field in ipairs { "exchange", "routing_key", "mandatory", "props", "body" } do
    assert.is_true(one[field] == other[field], field)
  end
end

local stores = { memory = function() return assert(Memory.open()) end }
if there then stores.sqlite = function() return assert(Sqlite.open { path = path() }) end end

describe("an outbox", function()
  it("leaves no task behind that waits for its time", function()
    local before = timers.count()
    local outbox = assert(Outbox.open({ kind = "memory", interval = 3600 }, "publisher", 1, native, function() end))
    outbox:failed(assert(outbox:add(record "x")))
    local remove = outbox.store.remove
    outbox.store.remove = function() return nil, "not now" end
    outbox:done(assert(outbox:add(record "y")))
    native.run(function()
      while not outbox._flushing or timers.count() < before + 2 do native.sleep(0.001) end
      outbox.store.remove = remove
      outbox:close()
      native.sleep(0)
    end)
    assert.equal(before, timers.count())
  end)

  it("tries again to delete what it could not, also where that throws", function()
    local outbox = assert(Outbox.open("memory", "publisher", 1, native, function() end))
    local row = assert(outbox:add(record "x"))
    local remove = outbox.store.remove
    outbox.store.remove = function() error("not enough memory", 0) end
    outbox:done(row)
    local ok, err = outbox:flush()
    assert.is_nil(ok)
    assert.matches("memory", err)
    outbox.store.remove = remove
    assert.is_true(outbox:flush())
    assert.equal(0, outbox.count)
    outbox:close()
  end)
end)

for name, open in pairs(stores) do
  describe("an outbox of kind " .. name .. " #smoke", function()
    local store
    before_each(function() store = open() end)
    after_each(function() store:close() end)

    it("gives back what it was given, byte for byte, in its order", function()
      local bodies = { "", "x", every_byte, "'; DROP TABLE message; --", ("\0\1'\255"):rep(300000) }
      local rows = {}
      for i, body in ipairs(bodies) do rows[i] = assert(store:add(record(body))) end
      assert.equal(5, store:count())
      local at = 0
      for i, body in ipairs(bodies) do
        local row, got = store:after(at)
        assert.equal(rows[i], row)
        same(record(body), got)
        same(record(body), store:get(row))
        at = row
      end
      assert.is_nil((store:after(at)))
    end)

    it("forgets what is removed, and nothing else", function()
      local rows = {}
      for i = 1, 1000 do rows[i] = assert(store:add(record(tostring(i)))) end
      local out = {}
      for i = 1, 1000 do if i ~= 500 then out[#out + 1] = rows[i] end end
      assert.is_true(store:remove(out))
      assert.equal(1, store:count())
      local row, got = store:after(0)
      assert.same({ rows[500], "500" }, { row, got.body })
      assert.is_nil((store:get(rows[1])))
      assert.is_true(store:remove(out))
      local again = assert(store:add(record "new"))
      assert.truthy(again > rows[1000], "a number is used once")
    end)
  end)
end

describe("an outbox in a file", function()
  if not there then
    pending "luasql-sqlite3 is not here"
    return
  end
  teardown(function()
    for _, name in ipairs(paths) do
      for _, suffix in ipairs { "", "-wal", "-shm", "-journal" } do os.remove(name .. suffix) end
    end
  end)

  local function write(name, bytes)
    local file = assert(io.open(name, "wb"))
    file:write(bytes)
    file:close()
  end

  local function no_store(name, text)
    local none, err = Sqlite.open { path = name }
    assert.is_nil(none)
    assert.equal("outbox", err.kind)
    assert.truthy(err.message:find(text, 1, true), err.message)
    assert.truthy(err.message:find(name, 1, true), err.message)
    return err
  end

  -- Not for a file that is in use: to read it by other means takes the lock off (as POSIX has it).
  local function refused(name, text)
    local before = process.slurp(name)
    local err = no_store(name, text)
    assert.is_true(before == process.slurp(name), "it was written to")
    return err
  end

  it("keeps its messages when it is closed, also when nobody closes it", function()
    local name = path()
    local store = assert(Sqlite.open { path = name })
    local row = assert(store:add(record "one"))
    store:close()
    store = assert(Sqlite.open { path = name })
    assert.same({ 1, "one" }, { store:count(), store:get(row).body })
    assert.is_nil((store:close()))
    local _, err = store:add(record "closed")
    assert.matches("it is closed", err.message)
  end)

  it("is kept in a file, not in what ends with the process", function()
    for _, name in ipairs { "", ":memory:" } do
      local opened, err = pcall(Outbox.open, { kind = "sqlite", path = name }, "publisher", 1, native)
      assert.is_false(opened)
      assert.matches("'path' must be the path of a file", err)
    end
  end)

  it("says so when a row cannot be read, and does not take that for the end of all", function()
    local store = assert(Sqlite.open { path = path() })
    local row = assert(store:add(record "one"))
    local db, closed = store._db, 0
    store._db = { execute = function()
      return { fetch = function() return nil, "LuaSQL: disk I/O error" end, close = function() closed = closed + 1 end }
    end }
    local function unread(problem)
      assert.truthy(problem)
      assert.equal("outbox", problem.kind)
      assert.matches("disk cannot be written or read", problem.message)
    end
    unread(select(3, store:after(0)))
    unread(select(2, store:get(row)))
    unread(select(2, store:count()))
    assert.equal(3, closed)
    store._db = db
    assert.equal("one", select(2, store:after(0)).body)
    store:close()
  end)

  it("belongs to one at a time, in this process and in others", function()
    local name = path()
    local store = assert(Sqlite.open { path = name })
    assert(store:add(record "one"))
    local err = no_store(name, "another process or publisher uses the outbox")
    assert.is_true(err.temporary)
    local script = process.file(([[
      local store, err = require("moonrabbit.outbox.sqlite").open { path = %q }
      print(store, err and err.kind, err)
    ]]):format(name))
    local result = process.run { script }
    os.remove(script)
    assert.matches("^nil%s+outbox%s.*another process", result.out)
    store:close()
    assert(Sqlite.open { path = name }):close()
  end)

  it("refuses a file that is none, or damaged, and leaves it alone", function()
    local name = path()
    write(name, ("this is not a database "):rep(100))
    assert.is_false(refused(name, "damaged, or no outbox").temporary)
    name = path()
    local store = assert(Sqlite.open { path = name })
    for i = 1, 200 do assert(store:add(record(("x"):rep(100) .. i))) end
    store:close()
    local bytes = process.slurp(name)
    write(name, bytes:sub(1, 8192) .. ("\255"):rep(4096 * 3) .. bytes:sub(8192 + 4096 * 3 + 1))
    refused(name, "damaged")
    write(name, bytes:sub(1, math.floor(#bytes / 2)))
    refused(name, "damaged")
    write(name, bytes)
    assert.equal(200, assert(Sqlite.open { path = name }):count())
  end)

  it("refuses a database of something else, or of another version", function()
    local name = path()
    local env = require("luasql.sqlite3").sqlite3()
    local db = env:connect(name)
    db:execute "CREATE TABLE message (text)"
    db:close()
    refused(name, "of something else")
    name = path()
    assert(Sqlite.open { path = name }):close()
    db = env:connect(name)
    db:execute "PRAGMA user_version = 99"
    db:close()
    refused(name, "of another version (99, not 1)")
    env:close()
  end)

  it("says so when it is full, and keeps what it has", function()
    local name = path()
    local store = assert(Sqlite.open { path = name })
    local row = assert(store:add(record "safe"))
    store._db:execute("PRAGMA max_page_count = 1"):close() -- as large as it is now
    local none, err = store:add(record(("x"):rep(500000)))
    assert.is_nil(none)
    assert.same({ "outbox", true }, { err.kind, err.temporary })
    assert.matches("the disk is full", err.message)
    assert.same({ 1, "safe" }, { store:count(), store:get(row).body })
    store._db:execute("PRAGMA max_page_count = 100000"):close()
    assert(store:add(record(("x"):rep(500000))))
    store:close()
  end)

  -- Fills the outbox at arg[1] until it refuses; with arg[2], a file that takes up room, goes on without that.
  local filler = [[
    local Sqlite = require "moonrabbit.outbox.sqlite"
    local record = { exchange = "", routing_key = "q", mandatory = true, props = "\0\0", body = ("x"):rep(2000) }
    local store = assert(Sqlite.open { path = arg[1] })
    local kept, row, err = 0
    repeat
      row, err = store:add(record)
      if row then kept = kept + 1 end
    until not row or kept == 100000
    print(err.kind, err.temporary, err.message)
    if arg[2] then
      os.remove(arg[2])
      print("room again", store:add(record) and store:count() == kept + 1)
    end
    store:close()
    print("kept", kept)
  ]]

  -- Runs it in a shell that has made the disk small, with mounts of its own if `apart`; answers what it printed.
  local function fill(prepare, words, apart)
    local script = process.file(filler)
    table.insert(words, 1, script)
    local shell = { "sh", "-c", prepare:format(process.command(words)) }
    if apart then shell = { "unshare", "-rm", "sh", "-c", shell[3] } end
    local result = process.run(shell, { raw = true })
    os.remove(script)
    return result.out, result.err
  end

  local function holds(name)
    local store = assert(Sqlite.open { path = name })
    local count = store:count()
    store:close()
    return count
  end

  it("keeps what it has when a file may not grow any more", function()
    local name = path()
    local out, err = fill("trap '' XFSZ && ulimit -f 200 && %s", { name })
    assert.matches("^outbox%s+true%s+.*the disk", out, err)
    local kept = tonumber(out:match "kept%s+(%d+)")
    assert.is_true(kept > 0 and kept < 100000)
    assert.equal(kept, holds(name))
  end)

  local may_mount = process.run({ "unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt" }, { raw = true }).code == 0
  local on_a_disk = may_mount and it or function(what) it(what, function() pending "may not mount a disk" end) end

  on_a_disk("says so when the disk is full, keeps what it has, and goes on once there is room", function()
    local copy = path()
    local out, err = fill("mount -t tmpfs -o size=2m tmpfs /mnt && head -c 1000000 /dev/zero > /mnt/filler && %s "
      .. "&& cp /mnt/outbox.db " .. copy, { "/mnt/outbox.db", "/mnt/filler" }, true)
    assert.matches("^outbox%s+true%s+outbox '/mnt/outbox.db': the disk is full", out, err)
    assert.matches("room again%s+true", out, err)
    local kept = tonumber(out:match "kept%s+(%d+)")
    assert.is_true(kept > 0 and kept < 100000)
    assert.equal(kept + 1, holds(copy))
  end)

  it("says so where it may not write", function()
    local none, err = Sqlite.open { path = "/nonexistent/folder/outbox.db" }
    assert.is_nil(none)
    assert.matches("cannot be opened or made", err.message)
    local name = path()
    local store = assert(Sqlite.open { path = name })
    store._db:execute "PRAGMA query_only = 1"
    none, err = store:add(record "x")
    assert.is_nil(none)
    assert.same({ "outbox", false }, { err.kind, err.temporary })
    assert.matches("may only be read", err.message)
    store:close()
  end)
end)
