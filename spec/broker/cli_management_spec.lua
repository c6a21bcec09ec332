-- The commands that ask the management API.
local management = require "moonrabbit.management"
local broker = require "support.broker"
local process = require "support.process"
local ok, unique = broker.ok, broker.unique

local url = os.getenv "AMQP_MANAGEMENT_URL"

describe("the command line", function()
  if not url then pending "AMQP_MANAGEMENT_URL is not set: no broker with the management plugin" return end

  local api = management.new(url)
  local files = {}

  local function moonrabbit(...)
    return process.run({ "bin/moonrabbit", ... }, { env = { AMQP_URL = broker.url, MOONRABBIT_MANAGEMENT_URL = url } })
  end

  local function file(text)
    files[#files + 1] = text and process.file(text) or os.tmpname()
    if not text then os.remove(files[#files]) end
    return files[#files]
  end

  after_each(function()
    for _, path in ipairs(files) do os.remove(path) end
    files = {}
    broker.close_all()
  end)

  it("exports definitions, once, compares and imports them", function()
    local vhost = unique "cli"
    ok(api:set_vhost(vhost))
    finally(function() api:delete_vhost(vhost) end)
    ok(api:set_permissions(vhost, "guest"))
    local ch = ok(broker.connect { vhost = vhost }:channel())
    ok(ch:queue_declare("kept", { durable = true }))
    local path = file()
    local result = moonrabbit("definitions", "export", path, "--only-vhost", vhost)
    assert.equal("", result.err)
    assert.equal(0, result.code)
    assert.matches("1 queues", result.out)
    assert.matches('"kept"', process.slurp(path))
    result = moonrabbit("definitions", "export", path, "--only-vhost", vhost)
    assert.equal(1, result.code)
    assert.matches("not written over", result.err)

    assert.equal(0, moonrabbit("definitions", "compare", path, "--only-vhost", vhost).code)
    ok(ch:queue_delete("kept"))
    result = moonrabbit("definitions", "compare", path, "--only-vhost", vhost)
    assert.equal(1, result.code)
    assert.matches("^missing   queues kept", result.out)
    assert.equal(0, moonrabbit("definitions", "import", path, "--only-vhost", vhost).code)
    result = moonrabbit("definitions", "compare", path, "--only-vhost", vhost, "--json")
    assert.equal("", result.out)
    assert.equal(0, result.code)
  end)

  it("refuses files that are missing or no definitions", function()
    for _, command in ipairs { "import", "compare" } do
      assert.equal(2, moonrabbit("definitions", command, "/nothing/there").code)
      local result = moonrabbit("definitions", command, file "{ half")
      assert.equal(2, result.code)
      assert.matches("no JSON", result.err)
    end
    assert.equal(1, moonrabbit("definitions", "export", "/nothing/there").code)
  end)

  it("says when the management API is not there, or refuses", function()
    local result = moonrabbit("cluster", "status", "--management", "http://127.0.0.1:1")
    assert.equal(3, result.code)
    assert.matches("refused", result.err)
    result = moonrabbit("cluster", "status", "--management", (url:gsub("guest:guest", "guest:hush4711")))
    assert.equal(4, result.code)
    assert.not_matches("hush4711", result.err)
    assert.equal(2, moonrabbit("cluster", "status", "--management", "amqp://x").code)
    assert.equal(2, moonrabbit("definitions").code)
  end)

  it("shows a cluster", function()
    local result
    broker.eventually(function() -- the API's figures are some seconds old: an alarm of another spec is still in them
      result = moonrabbit("cluster", "status")
      return result.out:find "node +%S+@%S+ runs"
    end, 60, "a node without an alarm")
    assert.equal("", result.err)
    assert.matches("queues", result.out)
    result = moonrabbit("cluster", "status", "--json")
    assert.equal("cluster", require("cjson").decode(result.out:match "^[^\n]+").step)
  end)

  it("says that a service of DNS is not there", function()
    local result = process.run({ "bin/moonrabbit", "doctor", "--timeout", "1" },
      { env = { AMQP_URL = "amqp+srv://nobody.invalid" } })
    assert.equal(3, result.code)
    assert.matches("no SRV records of _amqp._tcp.nobody.invalid", result.out)
  end)
end)
