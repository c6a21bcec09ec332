-- redis-lua is plain Lua: Debian has it in the folders of older Luas only.
package.path = package.path .. ";/usr/share/lua/5.3/?.lua"

local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local dedupe = require "moonrabbit.app.dedupe"
local redis_server = require "support.redis_server"

describe("dedupe.redis", function()
  local server, serial, open = nil, 0, {}

  setup(function() server = redis_server.start { password = "se cret/1" } end)
  teardown(function() server:stop() end)
  after_each(function()
    for i = #open, 1, -1 do
      open[i]:close()
      open[i] = nil
    end
  end)

  local function unique()
    serial = serial + 1
    return "key " .. serial
  end

  local function new(opts)
    local all = { url = ("redis://127.0.0.1:%d/0"):format(server.port), password = server.password, timeout = 20 }
    for key, value in pairs(opts or {}) do all[key] = value end
    local store = dedupe.redis(all)
    open[#open + 1] = store
    return store
  end

  local function eventually(fn)
    local deadline = native.now() + 20
    repeat
      if fn() then return end
      moonrabbit.sleep(0.01)
    until native.now() > deadline
    error("did not happen in time", 2)
  end

  it("knows what is new, running and done, over processes", function()
    local one, other, key = new(), new(), unique()
    assert.equal("new", one:begin(key, 30))
    assert.equal("running", one:begin(key, 30))
    assert.equal("running", other:begin(key, 30))
    assert.is_true(one:commit(key))
    assert.equal("done", one:begin(key, 30))
    assert.equal("done", other:begin(key, 30))
    key = unique()
    one:begin(key, 30)
    assert.is_true(one:abort(key))
    assert.equal("new", other:begin(key, 30))
  end)

  it("a claim ends with its lease, and a memory with its ttl", function()
    local store, key = new { ttl = 0.01 }, unique()
    assert.equal("new", store:begin(key, 0.01))
    eventually(function() return store:begin(key, 30) == "new" end)
    store:commit(key)
    eventually(function() return store:begin(key, 30) == "new" end)
  end)

  it("gives back no claim of somebody else", function()
    local one, other, key = new(), new(), unique()
    assert.equal("new", one:begin(key, 0.01))
    eventually(function() return other:begin(key, 30) == "new" end)
    assert.is_true(one:abort(key))
    assert.equal("running", one:begin(key, 30))
    assert.is_true(other:abort(key))
    assert.equal("new", one:begin(key, 30))
  end)

  it("takes keys of any bytes, a database and a prefix", function()
    local key = "\0\r\n\255 $5\r\n" .. unique()
    local here, there, prefixed = new(), new { url = ("redis://127.0.0.1:%d/3"):format(server.port) },
      new { prefix = "p:" }
    for _, store in ipairs { here, there, prefixed } do assert.equal("new", store:begin(key, 30)) end
    for _, store in ipairs { here, there, prefixed } do assert.equal("running", store:begin(key, 30)) end
  end)

  it("speaks over a unix socket", function()
    local store, key = new { path = server.path }, unique()
    assert.equal("new", store:begin(key, 30))
    assert.equal("running", new():begin(key, 30))
  end)

  it("lets one of many tasks have a key, over few connections", function()
    local store, key = new { connections = 3 }, unique()
    local counts, left = { new = 0, running = 0 }, 50
    moonrabbit.run(function()
      for _ = 1, 50 do
        moonrabbit.spawn(function()
          local state = assert(store:begin(key, 30))
          counts[state] = counts[state] + 1
          left = left - 1
        end)
      end
      eventually(function() return left == 0 end)
    end)
    assert.same({ new = 1, running = 49 }, counts)
    assert.is_true(store.clients.open <= 3)
  end)

  it("says why Redis lets nobody in, without the password", function()
    local none, err = new({ password = "wrong-password" }):begin(unique(), 30)
    assert.is_nil(none)
    assert.equal("auth", err.kind)
    assert.is_false(err.temporary)
    assert.is_nil(tostring(err):find("wrong-password", 1, true))
    none, err = new({ password = function() return nil, "the vault is shut" end }):begin(unique(), 30)
    assert.is_nil(none)
    assert.equal("auth", err.kind)
    assert.matches("the vault is shut", tostring(err))
  end)

  it("is away while Redis is, and back with it", function()
    local other = redis_server.start()
    finally(function() other:stop() end)
    local store, key = new { url = other:url(), password = false or nil }, unique()
    store.server.password = nil
    assert.equal("new", store:begin(key, 30))
    other:stop()
    local none, err = store:begin(key, 30)
    assert.is_nil(none)
    assert.is_true(err.temporary)
    assert.is_true(err.kind == "refused" or err.kind == "closed")
    assert.is_nil((store:commit(key)))
    other:start()
    assert.is_true(store:commit(key))
    assert.equal("done", store:begin(key, 30))
  end)

  it("knows its own claim again that had no answer, and lets one task have it", function()
    local hanging = redis_server.start()
    finally(function() hanging:stop() end)
    local store, key = new { url = hanging:url() }, unique()
    store.server.password = nil
    assert.equal("new", store:begin("first", 30)) -- connected
    hanging.process:signal "STOP"
    local patience = store.server.timeout
    store.server.timeout = 0.3
    local none, err = store:begin(key, 30)
    assert.is_nil(none)
    assert.equal("timeout", err.kind)
    store.server.timeout = patience
    hanging.process:signal "CONT" -- and does what it was sent before
    local other = new { url = hanging:url() }
    other.server.password = nil
    eventually(function() return other:begin(key, 30) == "running" end)
    assert.equal("new", store:begin(key, 30))
    assert.equal("running", store:begin(key, 30))
    assert.is_true(store:commit(key))
    assert.equal("done", other:begin(key, 30))
  end)

  it("knows it again too where several tasks tried", function()
    local hanging = redis_server.start()
    finally(function() hanging:stop() end)
    local store, key = new { url = hanging:url() }, unique()
    store.server.password = nil
    moonrabbit.run(function()
      assert.equal("new", store:begin("first", 30))
      hanging.process:signal "STOP"
      local patience = store.server.timeout
      store.server.timeout = 0.3
      local left = 3
      for _ = 1, 3 do
        moonrabbit.spawn(function()
          assert.is_nil((store:begin(key, 30)))
          left = left - 1
        end)
      end
      eventually(function() return left == 0 end)
      store.server.timeout = patience
      hanging.process:signal "CONT"
      local other = new { url = hanging:url() }
      other.server.password = nil
      eventually(function() return other:begin(key, 30) == "running" end)
      assert.equal("new", store:begin(key, 30))
      assert.equal("running", store:begin(key, 30))
      assert.is_true(store:commit(key))
      assert.equal("done", other:begin(key, 30))
    end)
  end)

  it("gives up on a server that says nothing", function()
    local silent = assert(native.listen("127.0.0.1", 0))
    finally(function() silent:close() end)
    local store = new { url = ("redis://127.0.0.1:%d"):format(silent:port()), timeout = 0.05 }
    local none, err = store:begin(unique(), 30)
    assert.is_nil(none)
    assert.equal("timeout", err.kind)
    assert.equal(0, store.clients.open)
  end)

  it("does not take another server for a Redis", function()
    local strange = assert(native.listen("127.0.0.1", 0))
    finally(function() strange:close() end)
    local store = new { url = ("redis://127.0.0.1:%d"):format(strange:port()) }
    moonrabbit.run(function()
      moonrabbit.spawn(function()
        local peer = strange:accept()
        peer:read()
        peer:write "HTTP/1.1 400 Bad Request\r\n\r\n"
        peer:close()
      end)
      local none, err = store:begin(unique(), 30)
      assert.is_nil(none)
      assert.matches("unknown response", tostring(err))
    end)
  end)

  it("refuses options that cannot be", function()
    assert.error_matches(function() dedupe.redis { url = "http://x" } end, "redis://")
    assert.error_matches(function() dedupe.redis { url = "redis://x/db" } end, "database must be a number")
    assert.error_matches(function() dedupe.redis { ttl = 0 } end, "'ttl'")
    assert.error_matches(function() dedupe.redis { tt = 0 } end, "did you mean 'ttl'")
  end)
end)
