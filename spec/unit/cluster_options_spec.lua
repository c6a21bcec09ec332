-- Options of moonrabbit.connect about clusters that are wrong: they throw, naming the option and this line.
local moonrabbit = require "moonrabbit"

describe("options about clusters", function()
  for _, case in ipairs {
    { { mode = "clever" }, '"direct" or "proxy" or "smart"' },
    { { near = "q" }, "'near' needs mode = \"smart\"" },
    { { management = "http://x", mode = "direct" }, "'management' needs mode = \"smart\"" },
    { { smart = {} }, "'smart' needs mode" },
    { { mode = "smart", management = "amqp://x" }, "must start with http" },
    { { mode = "smart", management = { { uri = "http://x", usr = "y" } } }, "did you mean 'user'" },
    { { mode = "smart", management = { "http://x", 5 } }, "an address, a table of options, or a list of these" },
    { { mode = "smart", smart = { refrsh = 5 } }, "did you mean 'refresh'" },
    { { mode = "smart", smart = { quarantine = { factor = 0 } } }, "'factor'" },
    { { mode = "proxy", endpoints = { "amqp://a", "amqp://b" } }, "takes one endpoint" },
    { { dns = { server = "x" } }, "did you mean 'servers'" },
    { { dns = { servers = "1.2.3.4" } }, "a list of addresses of name servers" },
    { { dns = { servers = { "1.2.3.4", "ns.example" } } }, "'servers' must be a list of addresses" },
    { { dns = { servers = {} } }, "a list of addresses of name servers" },
    { { dns = { search = { "a", nil, "b" } } }, "a list of domains" },
    { { endpoints = { "amqp://a", nil, "amqp://b" } }, "a list of URIs" },
    { { endpoints = { "amqp://a", also = "amqp://b" } }, "'endpoints' must be a list of URIs" },
    { { mode = "smart", management = { "http://a", nil, "http://b" } }, "a list without gaps" },
    { { shuffle = "yes" }, "'shuffle' must be a boolean" },
    { { uri = "amqp+srv://host:5672" }, "a service of DNS has a name, and no port" },
    { { sites = { primary = {} } }, "sites.standby is missing" },
    { { sites = { primary = {}, standby = {}, after = -1 } }, "'after'" },
    { { sites = { primary = {}, standby = {}, probe = 0 } }, "'probe' must be a number of seconds above 0" },
    { { sites = { primary = { tls = { verfy = false } }, standby = {} } }, "did you mean 'verify'" },
  } do
    it(case[2], function()
      local ok, err = pcall(function() moonrabbit.connect(case[1]) end)
      assert.is_false(ok)
      assert.truthy(err:find(case[2], 1, true), err)
      assert.matches("cluster_options_spec", err)
    end)
  end
end)
