local dedupe = require "moonrabbit.app.dedupe"
local postgres_server = require "support.postgres_server"
local process = require "support.process"
local rig = require "support.runner_bench"

local function table_count(connection, name)
  local cursor = assert(connection:execute("SELECT COUNT(*) FROM " .. name))
  local count = tonumber((cursor:fetch()))
  cursor:close()
  return count
end

-- What holds for every database. new(opts) -> a store; connect() -> a LuaSQL connection of the user's.
local function behaves(new, connect)
  local serial, time = 0, 1000
  local function now() return time end
  local function unique()
    serial = serial + 1
    return "key " .. serial
  end

  it("knows what is new, running and done, over connections", function()
    local one, other, key = new { now = now }, new { now = now }, unique()
    assert.equal("new", one:begin(key, 30))
    assert.equal("running", one:begin(key, 30))
    assert.equal("running", other:begin(key, 30))
    assert.is_true(one:commit(key))
    assert.equal("done", other:begin(key, 30))
    key = unique()
    one:begin(key, 30)
    assert.is_true(one:abort(key))
    assert.equal("new", other:begin(key, 30))
  end)

  it("a claim ends with its lease, and goes to one caller", function()
    local one, other, third, key = new { now = now }, new { now = now }, new { now = now }, unique()
    assert.equal("new", one:begin(key, 30))
    time = time + 30
    assert.equal("new", other:begin(key, 30))
    assert.equal("running", third:begin(key, 30))
    assert.is_true(one:abort(key)) -- not its claim any more
    assert.equal("running", third:begin(key, 30))
    assert.is_true(one:commit(key)) -- it was handled all the same
    assert.equal("done", third:begin(key, 30))
  end)

  it("forgets what is done after its ttl", function()
    local store, key = new { now = now, ttl = 100 }, unique()
    store:begin(key, 30)
    store:commit(key)
    time = time + 99
    assert.equal("done", store:begin(key, 30))
    time = time + 1
    assert.equal("new", store:begin(key, 30))
  end)

  it("deletes old keys now and then", function()
    local store = new { now = now, ttl = 100, table = "swept" }
    for _ = 1, 9 do store:commit(unique()) end
    time = time + 100
    store.commits = 999
    local key = unique()
    store:commit(key)
    local connection = connect()
    assert.equal(1, table_count(connection, "swept"))
    connection:close()
    assert.equal("done", store:begin(key, 30))
  end)

  it("takes keys of any bytes", function()
    local store = new { now = now }
    for _, key in ipairs { "", "it's", "'; DROP TABLE moonrabbit_seen; --", "\0\1\255", ("x"):rep(500), "x:6162", "ab",
      "k:ab", "ä" } do
      assert.equal("new", store:begin(key, 30))
      assert.equal("running", store:begin(key, 30))
      store:commit(key)
      assert.equal("done", store:begin(key, 30))
    end
  end)

  it("joins the transaction of the handler: both or neither", function()
    local connection, watcher, key = connect(), connect(), unique()
    assert(connection:execute "CREATE TABLE effects (id VARCHAR(100))")
    local store = new { now = now, connection = function() return connection end, table = "joined" }
    local plain = new { now = now, table = "joined" }

    assert.equal("new", store:begin(key, 30))
    assert(connection:execute "INSERT INTO effects VALUES ('one')")
    assert.equal("running", store:begin("another", 30)) -- one transaction at a time
    assert.is_true(store:abort(key))
    assert.equal(0, table_count(watcher, "effects"))

    assert.equal("new", store:begin(key, 30))
    assert(connection:execute "INSERT INTO effects VALUES ('one')")
    assert.is_true(store:commit(key))
    assert.equal(1, table_count(watcher, "effects"))
    assert.equal("done", store:begin(key, 30))
    assert.equal("done", plain:begin(key, 30))
    assert.equal("new", store:begin("another", 30))
    assert.is_true(store:commit "another")

    local none, err = store:commit(key) -- its transaction is over
    assert.is_nil(none)
    assert.matches("rolled back", err.message)
    connection:close()
    watcher:close()
  end)

  it("a transaction that broke is rolled back, and the key is free", function()
    local connection, key = connect(), unique()
    local store = new { now = now, connection = function() return connection end, table = "broke" }
    assert.equal("new", store:begin(key, 30))
    assert.is_nil((connection:execute "INSERT INTO there_is_no_such_table VALUES (1)"))
    assert.is_true(store:abort(key))
    assert.equal("new", store:begin(key, 30))
    assert.is_true(store:commit(key))
    assert.equal("done", store:begin(key, 30))
    connection:close()
  end)

  it("knows its own claim again that had no answer", function()
    local store, other, key = new { now = now }, new { now = now }, unique()
    assert.equal("new", store:begin(key, 30))
    local claim = store.leases[key]
    store.unsure[key] = claim -- as if the answer had been lost
    assert.equal("running", other:begin(key, 30))
    assert.equal("new", store:begin(key, 30))
    assert.equal(claim, store.leases[key])
    assert.equal("running", store:begin(key, 30))
  end)

  -- An app's consumer whose handler writes in the store's transaction.
  local function consumer(name, handler, opts)
    local connection = opts and opts.connection or connect()
    assert(connection:execute(("CREATE TABLE IF NOT EXISTS %s_effects (id VARCHAR(100))"):format(name)))
    local store = new { now = now, connection = opts and opts.current or function() return connection end,
      table = name .. "_seen" }
    local r
    local function write(text)
      return connection:execute(("INSERT INTO %s_effects VALUES ('%s')"):format(name, text))
    end
    r = rig.new { dedupe = store, retry = require "moonrabbit".retry.constant { delay = 5, attempts = 3 },
      handler = function(msg) return handler(msg, write, connection, r) end }
    function r.disposal.in_process() return true end
    return r, function()
      local watcher = connect()
      local count = table_count(watcher, name .. "_effects")
      watcher:close()
      return count
    end, connection
  end

  local function id(key) return { properties = { message_id = key } } end

  it("lets nothing of an attempt that failed become true with the next one", function()
    local runs = 0
    local r, effects, connection = consumer("attempts", function(_, write)
      runs = runs + 1
      assert(write("run " .. runs))
      if runs == 1 then return nil, "no" end
    end)
    local msg = r:handle(id "a", 1)
    assert.equal(0, effects())
    r.runtime.advance(10)
    assert.equal("ack", msg.done)
    assert.same({ "retry", "ok" }, r.outcomes)
    assert.equal(1, effects())
    assert.equal("ack", r:handle(id "a").done)
    assert.same({ "retry", "ok", "duplicate" }, r.outcomes)
    assert.equal(1, effects())
    connection:close()
  end)

  it("does not ack what a handler has rolled back itself", function()
    local runs = 0
    local r, effects, connection = consumer("undone", function(_, write, connection)
      runs = runs + 1
      assert(write("run " .. runs))
      if runs == 1 then connection:rollback() end
    end)
    local msg = r:handle(id "a", 1)
    assert.is_nil(msg.done)
    assert.truthy(r.failures[1].message:find("the transaction was not committed", 1, true), r.failures[1].message)
    r.runtime.advance(10)
    assert.equal("ack", msg.done)
    assert.equal(1, effects())
    connection:close()
  end)

  it("does not take the commit of a broken transaction for one", function()
    local runs = 0
    local r, effects, connection = consumer("swallowed", function(_, write, connection)
      runs = runs + 1
      assert(write("run " .. runs))
      if runs == 1 then connection:execute "INSERT INTO there_is_no_such_table VALUES (1)" end -- and nobody looks
    end)
    local msg = r:handle(id "a", 10)
    assert.equal("ack", msg.done)
    assert.equal(1, effects()) -- SQLite goes on after the error, PostgreSQL does not: the message was handled again
    connection:close()
  end)

  it("a process that dies in its transaction leaves nothing", function()
    local connection, key = connect(), unique()
    local store = new { now = now, connection = function() return connection end, table = "died" }
    assert.equal("new", store:begin(key, 30))
    connection:close() -- as its socket or file is
    local other = new { now = now, table = "died" }
    assert.equal("new", other:begin(key, 30))
  end)
end

describe("dedupe.sql with SQLite", function()
  local path, stores = nil, {}
  local driver = require "luasql.sqlite3"
  local environment = driver.sqlite3()

  setup(function() path = os.tmpname() end)
  teardown(function()
    for _, suffix in ipairs { "", "-journal", "-wal", "-shm" } do os.remove(path .. suffix) end
  end)
  after_each(function()
    for i = #stores, 1, -1 do
      stores[i]:close()
      stores[i] = nil
    end
  end)

  local function new(opts)
    opts.driver = "sqlite3"
    if not opts.connection then opts.source = path end
    local store = dedupe.sql(opts)
    stores[#stores + 1] = store
    return store
  end

  behaves(new, function() return assert(environment:connect(path)) end)

  it("is away while the file cannot be written, and says why", function()
    local store = new {}
    store.opts.source = "/nonexistent/seen.db"
    local none, err = store:begin("a", 30)
    assert.is_nil(none)
    assert.is_true(err.temporary)
    assert.matches("cannot connect to the database: .*open", err.message)
    store.opts.source = path
    assert.equal("new", store:begin("after", 30))
  end)

  it("says that a file is no database, and leaves it as it is", function()
    local other = process.file(("this is no database\n"):rep(100))
    finally(function() os.remove(other) end)
    local store = dedupe.sql { driver = "sqlite3", source = other }
    local none, err = store:begin("a", 30)
    assert.is_nil(none)
    assert.matches("not a database", err.message)
    assert.equal(("this is no database\n"):rep(100), process.slurp(other))
    store:close()
  end)

  it("is refused in nginx", function()
    assert.error_matches(function() new({}):attach { name = "resty" } end, "would block nginx")
  end)

  it("refuses options that cannot be", function()
    local function refuses(opts, text) assert.error_matches(function() dedupe.sql(opts) end, text) end
    refuses({ source = "x" }, "'driver' is missing")
    refuses({ driver = "oracle", source = "x" }, '"sqlite3" or "postgres"')
    refuses({ driver = "sqlite3" }, "'source' is missing")
    refuses({ driver = "sqlite3", source = "x", table = "a; DROP TABLE b" }, "a name of a table")
    refuses({ driver = "sqlite3", source = "x", connection = print }, "mean nothing")
    refuses({ driver = "sqlite3", source = "x", ttl = 0 }, "'ttl'")
  end)
end)

describe("dedupe.sql with PostgreSQL", function()
  local missing = postgres_server.missing()
  if missing then
    pending("needs a server: " .. missing, function() end)
    return
  end
  local server, environment
  local stores = {}

  setup(function()
    server = postgres_server.start()
    environment = require("luasql.postgres").postgres()
  end)
  teardown(function() server:stop() end)
  after_each(function()
    for i = #stores, 1, -1 do
      stores[i]:close()
      stores[i] = nil
    end
  end)

  local function new(opts)
    opts.driver = "postgres"
    if not opts.connection then opts.source, opts.user, opts.host = "spec", "spec", server.dir end
    local store = dedupe.sql(opts)
    stores[#stores + 1] = store
    return store
  end

  behaves(new, function() return assert(environment:connect("spec", "spec", "", server.dir)) end)

  it("handles once more what was undone because the database went away before the commit", function()
    local connection
    local function current()
      if not connection then connection = environment:connect("spec", "spec", "", server.dir) end
      return connection
    end
    assert(current():execute "CREATE TABLE away_effects (id VARCHAR(100))")
    local runs = 0
    local r
    r = rig.new { dedupe = new { connection = current, table = "away_seen" }, handler = function()
      runs = runs + 1
      assert(connection:execute(("INSERT INTO away_effects VALUES ('run %d')"):format(runs)))
      if runs == 1 then
        server:kill()
        connection = nil -- the user's own function opens another one
      end
    end }
    local msg = r:handle({ properties = { message_id = "a" } }, 5)
    assert.same({ 1, nil }, { runs, msg.done })
    assert.truthy(r.log[1]:find("waiting for it", 1, true), r.log[1])
    server:start()
    r.runtime.advance(5)
    assert.equal("ack", msg.done)
    assert.same({ "ok" }, r.outcomes)
    assert.equal(2, runs)
    local watcher = environment:connect("spec", "spec", "", server.dir)
    assert.equal(1, table_count(watcher, "away_effects"))
    watcher:close()
    connection:close()
  end)

  it("is away while the database is, and back with it", function()
    local store = new {}
    assert.equal("new", store:begin("surviving", 30))
    server:kill()
    local none, err = store:begin("other", 30)
    assert.is_nil(none)
    assert.is_true(err.temporary)
    assert.is_nil((store:commit "surviving"))
    server:start()
    assert.is_true(store:commit "surviving")
    assert.equal("done", store:begin("surviving", 30))
  end)
end)
